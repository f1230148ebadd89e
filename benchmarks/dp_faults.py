"""Faults in a group of data-parallel ranks with expert parallelism, under load, one after another.

    python benchmarks/dp_faults.py --rounds 50

Each round starts streams, then kills, stops or breaks a rank or an engine core (sometimes a second one a few seconds
later), and measures how long it takes until the last request in flight has ended, until /health says 503, and until a
request is answered again. Exit status 1: something hung, or was left over at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults"), str(TESTS / "faults" / "injected")]  # the same servers as tests use

import httpx  # noqa: E402
from group_server import FLAGS, GroupServer, group_serving, reason  # noqa: E402
from processes import Stream, streams  # noqa: E402
from sitecustomize import BROKEN, CORE_BROKEN  # noqa: E402
from tiny_models import build  # noqa: E402

ENDED_LIMIT_S, BACK_LIMIT_S = 10.0, 60.0
HUNG_S = 180.0
KINDS = ("kill rank", "kill core", "stop rank", "stop core", "raise in rank", "raise in core")
POLL_S = 0.05


@dataclass
class Round:
    """One fault and what came of it."""

    number: int
    fault: str
    n_streams: int
    told_s: float = -1.0  # /health was seen to be false
    ended_s: float = 0.0  # the last request in flight had ended
    back_s: float = -1.0  # a request was answered again
    n_failed: int = 0
    hung: bool = False

    @property
    def late(self) -> bool:
        """Whether it took longer than it may."""
        return self.ended_s > ENDED_LIMIT_S or not 0 <= self.back_s <= BACK_LIMIT_S

    def row(self) -> str:
        """A line of the table."""
        mark = "HUNG" if self.hung else "late" if self.late else ""
        return (
            f"| {self.number:5} | {self.fault:38} | {self.n_streams:7} | {self.n_failed:6} | {self.told_s:6.1f} | "
            f"{self.ended_s:7.1f} | {self.back_s:6.1f} | {mark:4} |"
        )


HEAD = f"| round | {'fault':38} | streams | failed | told s | ended s | back s |      |"


def inject(server: GroupServer, kind: str, number: int) -> None:
    """One fault; a victim that is not there at the moment, as in the middle of a restart, is passed over."""
    what, who = kind.split()[0], kind.split()[-1]
    if what == "raise":
        prompt = BROKEN if who == "rank" else CORE_BROKEN
        body = {"prompt": prompt, "max_tokens": 2}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=HUNG_S)
        return
    victim = server._child(f"{who}{number}")
    if victim is not None:
        victim.kill() if what == "kill" else victim.suspend()


def play(server: GroupServer, dice: random.Random, number: int, n_data: int) -> Round:
    """A round from its streams to the next answer."""
    n_streams = dice.choice([0, 1, 2, 4, 8, 12])
    running = streams(server, n_streams)
    time.sleep(dice.random())
    first, second = dice.choice(KINDS), dice.choice(["", "", "", *KINDS[:4]])
    victims = dice.randrange(n_data), dice.randrange(n_data)
    fault = first if first.startswith("raise") else f"{first}{victims[0]}"
    if second:
        second_after_s = dice.choice([0.0, 0.5, 2.0, 5.0])
        fault += f", {second}{victims[1]} +{second_after_s:g} s"
    this = Round(number, fault, n_streams)
    began_s = time.monotonic()
    inject(server, first, victims[0])
    if second:
        watch(server, running, this, began_s, lambda: time.monotonic() - began_s >= second_after_s)
        inject(server, second, victims[1])
        began_s = time.monotonic()  # the limits count from the last fault
    watch(server, running, this, began_s, lambda: this.told_s >= 0 and answers(server))
    this.back_s = -1.0 if this.hung else time.monotonic() - began_s
    for stream in running:
        stream.join(max(0.0, began_s + HUNG_S - time.monotonic()))
    this.hung |= any(stream.is_alive() for stream in running)
    this.n_failed = sum(stream.failed for stream in running)
    return this


def watch(server: GroupServer, running: list[Stream], this: Round, began_s: float, done: Callable[[], bool]) -> None:
    """Looks at health and streams until `done`, or until it hangs."""
    while not done():
        after_s = time.monotonic() - began_s
        if any(stream.is_alive() for stream in running):
            this.ended_s = after_s
        if this.told_s < 0 and reason(server):
            this.told_s = after_s
        if after_s > HUNG_S or server.popen.poll() is not None:
            this.hung = True
            return
        time.sleep(POLL_S)


def answers(server: GroupServer) -> bool:
    """Whether all is well by /health and by a request to every rank."""
    return not reason(server) and server.complete(prompt=[[5 + i, 7, 9] for i in range(8)]).status_code == 200


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--data", type=int, default=4, help="data-parallel size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults drawn (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="(default: a tiny random one)")
    parser.add_argument("--output", type=Path, help="JSON file for all rounds")
    return parser.parse_args()


def main() -> int:
    flags = parse_flags()
    dice = random.Random(flags.seed)
    rounds: list[Round] = []
    left = ""
    with tempfile.TemporaryDirectory() as folder:
        model = flags.model or build(
            Path(folder) / "model", "ernie4_5_moe", tokenizer=True, max_position_embeddings=4096, num_hidden_layers=8
        )
        env = {"PYTHONPATH": str(TESTS / "faults" / "injected"), "OMP_NUM_THREADS": "1"}
        with group_serving(model, Path(folder) / "run", flags.data, *FLAGS, env=env) as server:
            print(HEAD, "| " + " | ".join("-" * len(cell.strip()) for cell in HEAD.split("|")[1:-1]) + " |", sep="\n")
            for number in range(flags.rounds):
                rounds.append(play(server, dice, number, flags.data))
                print(rounds[-1].row(), flush=True)
                if rounds[-1].late:
                    print(server.console[-3000:], file=sys.stderr)
                if rounds[-1].hung:
                    break
            server.popen.terminate()
            try:
                if server.end() != 0 and not rounds[-1].hung:
                    left = f"exit status {server.popen.returncode}"
                server.check_nothing_left()
            except AssertionError as error:
                left = str(error) or "temporary files"
    if flags.output:
        flags.output.write_text(json.dumps([asdict(this) for this in rounds], indent=1) + "\n")
    n_hung, n_late = sum(this.hung for this in rounds), sum(this.late and not this.hung for this in rounds)
    print(
        f"{len(rounds)} rounds: {n_hung} hung, {n_late} late (requests after {ENDED_LIMIT_S:g} s, service after "
        f"{BACK_LIMIT_S:g} s); left over: {left or 'nothing'}"
    )
    return 1 if n_hung or left else 0


if __name__ == "__main__":
    sys.exit(main())
