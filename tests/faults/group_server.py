"""A server of several replicas in tests: its ranks and cores by their numbers, and what a fault must lead to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from processes import PATIENCE_S, Server, Stream, wait_for

ENDED_S = 10.0  # from a fault to the end of every request in flight
BACK_S = 60.0  # from a fault to the next answer
FLAGS = ("--max-model-len", "4096", "--num-gpu-blocks-override", "512", "--enable-expert-parallel")


class GroupServer(Server):
    """An api_server whose children are told apart by the files that take their output."""

    def child(self, name: str) -> psutil.Process:
        """The living process called `name`: "core2", "rank5"."""
        return wait_for(lambda: self._child(name), what=name)

    def _child(self, name: str) -> psutil.Process | None:
        for process in self.alive():
            try:
                if Path(f"/proc/{process.pid}/fd/1").readlink().stem == name:
                    return process
            except OSError:  # it ended meanwhile
                continue
        return None


@contextmanager
def group_serving(
    model: Path, folder: Path, n_data: int, *flags: str, env: dict[str, str] | None = None
) -> Iterator[GroupServer]:
    """A server that takes requests; whatever is left of it at the end is killed."""
    server = GroupServer(model, folder, "--data-parallel-size", str(n_data), *flags, env=env)
    try:
        server.wait_ready()
        server.tree()
        yield server
    finally:
        server.kill()


def check_fault_and_return(server: GroupServer, running: list[Stream], inject: Callable[[], object]) -> list[str]:
    """A fault: requests end in time, /health says so, all serve again by themselves. Returns what /health said."""
    before = server.alive()
    began_s = time.monotonic()
    inject()
    said = wait_for(lambda: reason(server), ENDED_S, "health to turn false")
    for stream in running:
        stream.join(max(began_s + ENDED_S - time.monotonic(), 0.0))
        assert not stream.is_alive(), f"a request goes on {ENDED_S:.0f} s after the fault: {server.console}"
        assert stream.failed and '"error"' in stream.text, stream.ended
    reasons = [said]

    def is_back() -> bool:
        found = reason(server)
        reasons.append(found)
        return not found

    wait_for(is_back, began_s + BACK_S - time.monotonic(), "health to turn true again")
    check_answers(server)
    assert time.monotonic() - began_s < BACK_S
    assert len(server.alive()) == len(before), [process.cmdline() for process in server.alive()]
    return [text for text in dict.fromkeys(reasons) if text]


def reason(server: Server) -> str:
    """Why /health is false; empty while it is true."""
    answer = httpx.get(f"{server.url}/health", timeout=PATIENCE_S)
    assert answer.status_code in (200, 503), answer.status_code
    return "" if answer.status_code == 200 else answer.json()["error"]["message"]


def check_answers(server: Server) -> None:
    """Several requests, so that every rank has one, are answered as one alone is."""
    prompts = [[5 + i, 7, 9] for i in range(8)]
    answer = server.complete(prompt=prompts)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == len(prompts)
