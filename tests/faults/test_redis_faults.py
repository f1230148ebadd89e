"""Servers that share requests through Redis, when it stands still for ten seconds and when it is started anew.

Every answer is compared with that of an undisturbed server, so none may be cut, doubled or continued wrongly. The model
and the prompts are fixed: their best and second best tokens lie at least 1e-5 apart (log probability), which
rounding does not bridge.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest
from processes import Server, Stream, serving, wait_for

from fastdeploy.admission.private_redis import PrivateRedis

pytestmark = pytest.mark.timeout(400)

ENDED_S = 120.0  # which a noisy machine keeps, too; from a fault to the end of every request in flight
CUT_S = 10.0
LOOK_S = (1.0, 5.0)  # into a cut: what comes of a request between the two was made by the server that accepted it
DEAD_S = 3.0  # from a kill to the new start
N_TOKENS = 1800
# Longer than the band in which loads count as equal, so that splitwise takes the servers in turns.
PROMPTS = [[3 + i, *(5 + (i * j) % 40 for j in range(150))] for i in range(10)]
FLAGS = ("--max-model-len", "2048", "--num-gpu-blocks-override", "512")
# With global a server keeps what it has slots for; the next ones wait until somebody has room.
FLAGS_OF = {"splitwise": (), "global": ("--max-num-seqs", "4")}


@dataclass(frozen=True)
class Pair:
    """Two servers of one topic and their Redis. Requests are sent to `here`; `texts` are the answers to `PROMPTS`."""

    redis: PrivateRedis
    here: Server
    there: Server
    texts: list[str]

    def start(self) -> list[Stream]:
        """A stream for each prompt; both servers work on some when this returns."""
        running = [Stream(self.here.url, prompt=p, max_tokens=N_TOKENS, temperature=0) for p in PROMPTS]
        wait_for(lambda: self.n_there() >= 2, what="requests on the other server")
        wait_for(lambda: self.here.metric("num_requests_running") >= 2, what="requests on the accepting server")
        assert all(stream.is_alive() for stream in running), "too fast to be disturbed"
        return running

    def n_there(self) -> float:
        """Requests that the other server runs for this one."""
        return self.there.metric("scheduler_requests_of_others")

    def check_ends(self, running: list[Stream], deadline_s: float) -> None:
        """All end by then (monotonic seconds), each with its whole answer."""
        for stream, text in zip(running, self.texts, strict=True):
            stream.join(max(deadline_s - time.monotonic(), 0.0))
            assert not stream.is_alive(), f"a request hangs: {self.here.console}"
            assert not stream.failed, (stream.ended, stream.text[-500:])
            assert answer_of(stream) == text

    def check_serving(self) -> None:
        """Nothing is left of the fault, and requests are shared as before it."""
        for server in (self.here, self.there):
            wait_for(lambda server=server: '"redis":"reachable"' in server.health_text().replace(" ", ""))
            wait_for(lambda server=server: server.metric("scheduler_accepted_requests") == 0, what="no request left")
            wait_for(lambda server=server: server.metric("scheduler_requests_of_others") == 0, what="no work left")
            wait_for(lambda server=server: server.metric("num_requests_running") == 0, what="idle engines")
        running = self.start()
        self.check_ends(running, time.monotonic() + ENDED_S)


@pytest.fixture(scope="module", params=["splitwise", "global"])
def pair(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    with PrivateRedis() as redis:
        flags = (*FLAGS, *FLAGS_OF[name], "--scheduler-name", name, *redis.flags, "--scheduler-topic", name)
        with serving(model, folder / "a", *flags) as here, serving(model, folder / "b", *flags) as there:
            answer = there.complete(prompt=PROMPTS, max_tokens=N_TOKENS)
            yield Pair(redis, here, there, [choice["text"] for choice in answer.json()["choices"]])


def test_redis_stands_still(pair: Pair) -> None:
    """Own requests go on, new ones are served by whom they reach, and those on the other server are continued here."""
    running = pair.start()
    n_own = pair.here.metric("num_requests_running")
    n_before = pair.here.metric("scheduler_placed_again_total")
    began_s = time.monotonic()
    with stopped(pair.redis):
        time.sleep(LOOK_S[0])
        before = [len(stream.text) for stream in running]
        time.sleep(LOOK_S[1] - LOOK_S[0])
        n_moved = sum(not s.is_alive() or len(s.text) > n for s, n in zip(running, before, strict=True))
        assert n_moved >= n_own
        for server in (pair.here, pair.there):
            answer = server.complete(prompt=PROMPTS[0], max_tokens=8)
            assert answer.status_code == 200, answer.text
            assert pair.texts[0].startswith(answer.json()["choices"][0]["text"])
        assert "unreachable" in pair.here.health_text()
        time.sleep(max(began_s + CUT_S - time.monotonic(), 0.0))
    pair.check_ends(running, began_s + ENDED_S)
    assert pair.here.metric("scheduler_placed_again_total") > n_before
    pair.check_serving()


def test_redis_is_killed_and_started_anew(pair: Pair) -> None:
    """All that it held is gone: who runs what, what waits, and who is alive."""
    running = pair.start()
    began_s = time.monotonic()
    pair.redis.stop_process()
    time.sleep(DEAD_S)
    pair.redis.restart()
    pair.check_ends(running, began_s + ENDED_S)
    pair.check_serving()


@contextmanager
def stopped(redis: PrivateRedis) -> Iterator[None]:
    """It takes connections and answers nothing, as behind a network that is cut."""
    redis.process.send_signal(SIGSTOP)
    try:
        yield
    finally:
        redis.process.send_signal(SIGCONT)


def answer_of(stream: Stream) -> str:
    """The text of a streamed completion."""
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])
