"""A rank or a core of an expert-parallel group that stands still: noticed, named, replaced with all the others."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from group_server import FLAGS, GroupServer, check_answers, check_fault_and_return, group_serving, reason
from processes import streams, wait_for

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupServer]:
    """Two replicas of two ranks each."""
    folder = tmp_path_factory.mktemp("stalls") / "run"
    with group_serving(model, folder, 2, "--tensor-parallel-size", "2", *FLAGS) as running:
        assert len(running.tree()) == 7
        yield running
        running.popen.terminate()
        assert running.end() == 0
        running.check_nothing_left()


@pytest.mark.parametrize(
    ("name", "n_requests", "cause"),
    [
        ("rank3", 4, "rank 3 (pid {pid}) has been silent"),
        ("core0", 4, "engine core0 (pid {pid}) has been silent"),
        ("core1", 0, "rank 1 has been silent"),
        ("rank0", 0, "rank 0 (pid {pid}) has been silent"),
    ],
)
def test_stopped(server: GroupServer, name: str, n_requests: int, cause: str) -> None:
    running = streams(server, n_requests)
    victim = server.child(name)
    said = check_fault_and_return(server, running, victim.suspend)
    assert any(cause.format(pid=victim.pid) in text for text in said + [stream.text for stream in running]), said


def test_a_short_stop_is_no_fault(server: GroupServer) -> None:
    running = streams(server, 2, max_tokens=30)
    victim = server.child("core1")
    victim.suspend()
    time.sleep(1.5)
    victim.resume()
    for stream in running:
        stream.join(60)
        assert not stream.failed and stream.text.count('"finish_reason":"length"') == 1
    assert reason(server) == ""
    check_answers(server)
    assert server.child("core1").pid == victim.pid


def test_one_killed_of_two_ranks_of_a_replica(server: GroupServer) -> None:
    victim = server.child("rank1")
    running = streams(server, 4)
    said = check_fault_and_return(server, running, victim.kill)
    assert any(f"rank 1 (pid {victim.pid}) was killed" in text for text in said + [s.text for s in running])


def test_stopped_while_starting(server: GroupServer) -> None:
    """Whoever waits for the victim does not wait as long as for a slow start."""
    before = server.child("rank2")

    def inject() -> None:
        server.child("rank0").kill()
        wait_for(lambda: not before.is_running(), what="the end of rank 2")
        server.child("rank2").suspend()

    check_fault_and_return(server, [], inject)
