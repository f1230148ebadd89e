"""Health is progress: a process that stands still turns /health false, a long computation does not."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import Server, Stream, serving, streams, wait_for

sys.path.insert(0, str(Path(__file__).with_name("injected")))
from sitecustomize import CRASH_MIN_TOKENS, LAYER_S, SLOW, STUCK

pytestmark = pytest.mark.timeout(120)

LIMIT_S = 4
NOTICED_S = 15.0


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory, saboteur: dict[str, str]) -> Iterator[Server]:
    env = {**saboteur, "FD_WORKER_ALIVE_TIMEOUT": str(LIMIT_S)}
    with serving(model, tmp_path_factory.mktemp("stalls") / "run", "--max-model-len", "4096", env=env) as running:
        yield running


def check_stall_and_recovery(server: Server, who: psutil.Process, reason: str) -> None:
    """Stops a process under load until /health says so, lets it go on, and sees the load through."""
    running = streams(server, 4, max_tokens=40)
    who.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: server.health() == 503, NOTICED_S, "health to turn false")
        assert reason in server.health_text()
    finally:
        who.send_signal(signal.SIGCONT)
    wait_for(lambda: server.health() == 200, NOTICED_S, "health to turn true again")
    for stream in running:
        stream.join(60)
        assert not stream.failed and stream.text.count('"finish_reason":"length"') == 1
    assert server.complete().status_code == 200


def test_stopped_rank(server: Server) -> None:
    check_stall_and_recovery(server, server.rank, "the ranks have made no progress for")


def test_stopped_core(server: Server) -> None:
    check_stall_and_recovery(server, server.core, "the engine core has been silent for")


def test_a_stopped_rank_without_work_is_no_stall(server: Server) -> None:
    rank = server.rank
    rank.send_signal(signal.SIGSTOP)
    try:
        until_s = time.monotonic() + LIMIT_S + 2
        while time.monotonic() < until_s:
            assert server.health() == 200
            time.sleep(0.2)
    finally:
        rank.send_signal(signal.SIGCONT)
    assert server.complete().status_code == 200


def test_a_long_prefill_is_progress(server: Server) -> None:
    """One step of 8 layers takes longer than the limit, but no layer does."""
    began_s = time.monotonic()
    slow = Stream(server.url, prompt=SLOW, max_tokens=1)
    while slow.is_alive():
        assert server.health() == 200
        time.sleep(0.1)
    assert time.monotonic() - began_s >= 8 * LAYER_S > LIMIT_S
    assert not slow.failed


def test_a_bug_in_one_answer_is_the_matter_of_that_request(server: Server) -> None:
    other = streams(server, 1, max_tokens=60)[0]
    answer = server.complete(min_tokens=CRASH_MIN_TOKENS, max_tokens=20)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "injected" not in answer.text and "injected: the detokeniser broke" in server.console
    broken = Stream(server.url, min_tokens=CRASH_MIN_TOKENS, max_tokens=20)
    broken.join(60)
    assert broken.failed
    other.join(60)
    assert not other.failed
    wait_for(lambda: not server.metric("num_requests_running"), 10, "an idle engine")
    assert server.health() == 200


def test_a_stuck_rank_and_the_way_out(model: Path, tmp_path: Path, saboteur: dict[str, str]) -> None:
    """Its heartbeat goes on, its work does not."""
    env = {**saboteur, "FD_WORKER_ALIVE_TIMEOUT": str(LIMIT_S)}
    with serving(model, tmp_path / "run", env=env) as server:
        stream = Stream(server.url, prompt=STUCK)
        wait_for(lambda: server.health() == 503, NOTICED_S, "health to turn false")
        assert "no progress" in server.health_text()
        server.popen.send_signal(signal.SIGTERM)
        wait_for(lambda: "shutting down" in server.console)
        server.popen.send_signal(signal.SIGTERM)
        assert server.end(20) == 130
        stream.join(10)
        assert '"finish_reason":"abort"' in stream.text
        server.check_nothing_left()


def test_front_end_killed_while_a_rank_is_stopped(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "run") as server:
        streams(server, 2)
        for process in (server.rank, server.core):
            process.send_signal(signal.SIGSTOP)
        server.popen.kill()
        server.check_nothing_left()
