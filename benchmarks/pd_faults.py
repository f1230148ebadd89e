"""What breaks between a prefill and a decode server, and what is left of it.

    python benchmarks/pd_faults.py --rounds 5
    python benchmarks/pd_faults.py --faults cut --rounds 20 --minutes 9 --model FOLDER --output cut.json
    python benchmarks/pd_faults.py --merge cut.json full.json --output all.json

A router, one server of each role on a CPU, all real processes. Each round sends requests at once (half streamed; greedy
, seeded, with log-probabilities, with two answers) and breaks something meanwhile. Every answer is compared, token for
token, with that of a mixed server. Afterwards no server may hold a page of anybody, and the router no request.
kill: SIGKILL to the server, which is started again at once. stop: SIGSTOP to all its processes, for 10 s. cut: prefill
is on another machine (a network namespace), and nothing reaches it for 5 s. full: decode has pages for few requests.
abort: clients leave at every stage. restart: SIGTERM and a new one.
Recovery: from the fault (of a stop or a cut, and where the load is the fault, from its end) until a short request, sent
twice a second meanwhile, is answered right and decode has got pages from prefill while it ran. There are slots for all
requests, so that these stand behind nobody ("full" aside).
The result file is written after every round. Ends with status 1 when a check fails. Several processes may run at once.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from machine import hardware
from pd_pair import Leave, Node, Outcome, Pair, ask, ask_all, body_of, make_prompts, n_descriptors, vocabulary
from report import RESULTS, own_versions, shown_command
from synthetic_fleet import metrics_of

from fastdeploy.demo.model import build_demo_model

sys.path.append(str(Path(__file__).parents[1] / "tests" / "faults"))  # the same machines as tests use
from network_namespaces import Machine, connected

FAULTS = ("kill-prefill", "kill-decode", "stop-prefill", "stop-decode", "cut", "full", "abort", "restart-prefill")
FAULTS += ("restart-decode",)
FLAGS = ("--max-model-len", "512", "--block-size", "16", "--no-enable-prefix-caching")
LASTS_S = {"stop-prefill": 10.0, "stop-decode": 10.0, "cut": 5.0}
PROBE_EVERY_S = 0.5
PROBE_S = 10.0
RECOVERY_LIMIT_S = 15.0
KEPT = 4
LET_GO_S = 100.0  # channels and peers that nobody uses are kept for a minute


async def recover(
    pair: Pair, body: dict[str, Any], expected: Outcome, since_s: float
) -> tuple[float, list[tuple[float, float, str]]]:
    """Probe until an answer is right and pages have travelled.

    Returns the seconds since `since_s`, and of each probe that ended when it was sent, when it ended, and how.
    """
    works = asyncio.Event()
    seen: list[tuple[float, float, str]] = []

    async def probe(client: httpx.AsyncClient) -> None:
        sent_s, before = time.monotonic() - since_s, await pulled(pair)
        found = await ask(client, pair.url, body, stream=False, leave=Leave(PROBE_S))
        how = found.error or found.cut or found.verdict(expected)
        if how == "right":
            how = "with pages" if await pulled(pair) > before else "without pages"
        seen.append((round(sent_s, 2), round(time.monotonic() - since_s, 2), how))
        if how == "with pages":
            works.set()

    async with httpx.AsyncClient(timeout=None) as client:
        probes: list[asyncio.Task[None]] = []
        try:
            while time.monotonic() - since_s < 120:
                probes.append(asyncio.create_task(probe(client)))
                try:
                    async with asyncio.timeout(PROBE_EVERY_S):
                        await works.wait()
                    return time.monotonic() - since_s, seen
                except TimeoutError:
                    continue
        finally:
            for task in probes:
                task.cancel()
    raise RuntimeError(f"the pair did not recover within 120 s; probes were told {seen[-5:]}")


async def pulled(pair: Pair) -> float:
    """Requests that decode served with pages of prefill; of one that is not ready none yet."""
    node = pair.nodes["decode"]
    if not node.is_ready:
        return 0.0
    try:
        return await asyncio.to_thread(node.metric, "pd_pulled_requests_total")
    except OSError:
        return 0.0


def strike(pair: Pair, fault: str, there: Machine | None) -> None:
    """Begin the fault."""
    kind, _, role = fault.partition("-")
    if kind == "cut" and there is not None:
        there.plug(connected=False)
    if role not in ("prefill", "decode"):
        return
    node = pair.nodes[role]
    if kind == "stop":
        node.signal_all(signal.SIGSTOP)
        return
    if kind == "kill":
        node.kill()
    else:
        node.process.terminate()  # it finishes what it has; the new one starts meanwhile
    pair.start(role)


def relent(pair: Pair, fault: str, there: Machine | None) -> None:
    """End a fault that lasts."""
    if there is not None:
        there.plug(connected=True)
    else:
        pair.nodes["prefill" if fault == "stop-prefill" else "decode"].signal_all(signal.SIGCONT)


def leaves(fault: str, number: int, n_tokens: int, rng: random.Random) -> Leave | None:
    """When a client goes: with "abort" at the start, before its first token, with it, later, or not at all."""
    if fault != "abort":
        return None
    stages = (
        Leave(0.02 * rng.random()),
        Leave(rng.random()),
        Leave(n_tokens=1),
        Leave(n_tokens=rng.randrange(2, n_tokens)),
        None,
    )
    return stages[number % len(stages)]


async def one_round(
    pair: Pair,
    fault: str,
    bodies: Sequence[dict[str, Any]],
    expected: Sequence[Outcome],
    rng: random.Random,
    there: Machine | None,
) -> dict[str, Any]:
    """Requests, the fault, what came of them, and what is left. The last of `bodies` is the probe."""
    start_s = time.monotonic()
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        asked = []
        for i, body in enumerate(bodies[:-1]):
            leave = leaves(fault, i, body["max_tokens"], rng)
            stream = bool(leave and leave.n_tokens) or i % 2 == 0
            asked.append(asyncio.create_task(ask(client, pair.url, body, stream=stream, leave=leave)))
        await asyncio.sleep(2 * rng.random())
        since_s = time.monotonic()
        n_open = sum(not one.done() for one in asked)
        await asyncio.to_thread(strike, pair, fault, there)
        if fault in LASTS_S:
            await asyncio.sleep(LASTS_S[fault])
            await asyncio.to_thread(relent, pair, fault, there)
            since_s = time.monotonic()
        if fault in ("full", "abort"):  # the load is the fault
            await asyncio.wait(asked)
            since_s = time.monotonic()
        probe = asyncio.create_task(recover(pair, bodies[-1], expected[-1], since_s))
        outcomes = await asyncio.gather(*asked)
        answers_s = time.monotonic() - start_s
        recovery_s, probes = await probe
    verdicts = [found.verdict(right) for found, right in zip(outcomes, expected[:-1], strict=True)]
    settle_s, left = await asyncio.to_thread(pair.settle)
    fallbacks = {k: v for k, v in metrics_of(pair.nodes["decode"].url).items() if "pd_fallbacks_total{" in k}
    return {
        "verdicts": dict(Counter(verdicts)),
        "wrong": [i for i, verdict in enumerate(verdicts) if verdict == "wrong"],
        "errors": Counter(
            (found.error or found.cut)[:160] for found in outcomes if found.error or found.cut
        ).most_common(3),
        "struck_s": round(since_s - start_s, 2),
        "open_then": n_open,
        "recovery_s": round(recovery_s, 2),
        "probes": probes,
        "answers_s": round(answers_s, 2),
        "settle_s": round(settle_s, 2),
        "left": {role: {k: v for k, v in one.items() if v} for role, one in left.items()},
        "fallbacks_so_far": fallbacks,
    }


def descriptors(pair: Pair) -> dict[str, int]:
    """Open files and sockets of each process tree."""
    return {name: n_descriptors(program) for name, program in (("router", pair.router), *pair.nodes.items())}


def none_left(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether no more are open but for connections that the router keeps for the next request."""
    return all(n <= before[name] + KEPT for name, n in after.items())


def wait_descriptors(pair: Pair, before: dict[str, int]) -> dict[str, int]:
    """Once they are no more than before, or after a while as they are."""
    deadline_s = time.monotonic() + LET_GO_S
    while True:
        now = descriptors(pair)
        if none_left(before, now) or time.monotonic() > deadline_s:
            return now
        time.sleep(1)


class Run:
    """All rounds of one fault with one pair; `found` grows with each."""

    def __init__(
        self, args: argparse.Namespace, fault: str, bodies: list[dict[str, Any]], right: list[Outcome]
    ) -> None:
        self._args, self._fault, self._bodies, self._right = args, fault, bodies, right
        self.found: dict[str, Any] = {"dp": args.dp, "rounds": []}

    def run(self, folder: Path, deadline_s: float, write: Callable[[], None]) -> None:
        """In `folder`; no round begins after the deadline. `write` is called after every one."""
        args, fault = self._args, self._fault
        n_slots = 16 if fault == "full" else len(self._bodies) + 30  # n=2, and probes
        flags = [*FLAGS, "--max-num-seqs", str(n_slots), "--data-parallel-size", str(args.dp)]
        if args.dp > 1:
            flags.append("--enable-expert-parallel")
        decode_flags = ["--num-gpu-blocks-override", "40"] if fault == "full" else []
        rng = random.Random(f"{fault} {args.seed}")
        with ExitStack() as stack:
            machines = None
            if fault == "cut":
                machines = connected(stack)
                machines[0].enter()
            pair = Pair(args.model, folder, flags, decode_flags, machines)
            stack.callback(pair.close)
            asyncio.run(ask_all(pair.url, self._bodies[:16], 16, stream=None))  # connections that are kept
            pair.settle()
            self.found["descriptors_before"] = descriptors(pair)
            while len(self.found["rounds"]) < args.rounds and time.monotonic() < deadline_s:
                there = machines[1] if machines else None
                try:
                    found = asyncio.run(one_round(pair, fault, self._bodies, self._right, rng, there))
                except Exception:
                    for node in pair.nodes.values():
                        print(f"{node.folder.name}: {node.last_words()}", file=sys.stderr)
                    raise
                self.found["rounds"].append(found)
                print(fault, len(self.found["rounds"]), json.dumps(found), file=sys.stderr, flush=True)
                write()
            self.found["descriptors_after"] = wait_descriptors(pair, self.found["descriptors_before"])


def checks(found: dict[str, Any]) -> dict[str, bool]:
    """What must hold of one fault."""
    rounds = found["rounds"]
    held = {
        "rounds ran": bool(rounds),
        "no wrong token": not any("wrong" in one["verdicts"] for one in rounds),
        "no end without a reason": not any("no reason" in one["verdicts"] for one in rounds),
        "no page or request is held afterwards": not any(held for one in rounds for held in one["left"].values()),
        f"recovery within {RECOVERY_LIMIT_S:g} s": all(one["recovery_s"] <= RECOVERY_LIMIT_S for one in rounds),
    }
    if "descriptors_after" in found:  # not while it runs
        held["no descriptor is left"] = none_left(found["descriptors_before"], found["descriptors_after"])
    return held


def expected_answers(model: Path, folder: Path, bodies: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Of a mixed server."""
    node = Node(model, folder, "mixed", (*FLAGS, "--max-num-seqs", "16"))
    try:
        found = asyncio.run(ask_all(node.url, bodies, 16, stream=False))
    finally:
        node.stop()
    if not all(one.finished for one in found):
        raise RuntimeError(
            f"the mixed server failed: {[one.error or one.cut for one in found if not one.finished][:3]}"
        )
    return found


def write(path: Path, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The result file, with the checks of what is there so far."""
    for one in results.values():
        one["checks"] = checks(one)
    content = {
        "benchmark": "pd_faults",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": own_versions(),
        "command": shown_command(sys.argv),
        "settings": {"requests": args.requests, "max_tokens": args.max_tokens, "server_flags": FLAGS},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Results of several files; rounds of the same fault are put together, and of descriptors the worst run is kept."""
    results: dict[str, Any] = {}
    for path in paths:
        for name, one in json.loads(path.read_text())["results"].items():
            if name not in results:
                results[name] = one
                continue
            known = results[name]
            known["rounds"] += one["rounds"]
            if checks(known).get("no descriptor is left", True):
                known.update({key: value for key, value in one.items() if key.startswith("descriptors")})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each fault")
    parser.add_argument("--minutes", type=float, default=1e6, help="no round begins later than that after the start")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--requests", type=int, default=50, help="at once")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks of each server")
    parser.add_argument("--seed", default="", help="other moments of the faults")
    parser.add_argument("--model", type=Path, help="a folder; without it the demo model")
    parser.add_argument("--merge", type=Path, nargs="+", help="result files to put together; runs nothing")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with it
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = args.output or RESULTS / f"pd_faults-{date}.json"
    results = merged(args.merge or [])
    if args.merge:
        write(path, args, results)
    else:
        run(args, path, results)
    for name, one in results.items():
        print(name, len(one["rounds"]), "rounds", json.dumps(one["checks"]), flush=True)
    return 0 if all(all(one["checks"].values()) for one in results.values()) else 1


def run(args: argparse.Namespace, path: Path, results: dict[str, Any]) -> None:
    """All faults asked for, into `results` and the file."""
    deadline_s = time.monotonic() + 60 * args.minutes
    args.model = args.model or build_demo_model(show_progress=False)
    prompts = make_prompts(args.requests, 5, 160, vocabulary(args.model))
    bodies = [body_of(number, prompt, args.max_tokens) for number, prompt in enumerate(prompts)]
    bodies.append(body_of(0, prompts[0][:20], 4))  # the probe
    with tempfile.TemporaryDirectory() as folder:
        right = expected_answers(args.model, Path(folder) / "mixed", bodies)
        for fault in args.faults.split(","):
            name = fault if args.dp == 1 else f"{fault}, {args.dp} ranks each"
            one = Run(args, fault, bodies, right)
            results[name] = one.found
            one.run(Path(folder) / fault, deadline_s, lambda: write(path, args, results))
            write(path, args, results)


if __name__ == "__main__":
    sys.exit(main())
