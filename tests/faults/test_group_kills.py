"""A rank or a core of an expert-parallel group killed or broken: requests end with the cause, the group comes back."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from group_server import FLAGS, GroupServer, check_answers, check_fault_and_return, group_serving
from processes import streams

sys.path.insert(0, str(Path(__file__).with_name("injected")))
from sitecustomize import BROKEN, CORE_BROKEN

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory, saboteur: dict[str, str]) -> Iterator[GroupServer]:
    folder = tmp_path_factory.mktemp("kills") / "run"
    with group_serving(model, folder, 4, *FLAGS, env=saboteur) as running:
        assert len(running.tree()) == 9
        yield running
        running.popen.terminate()
        assert running.end() == 0
        running.check_nothing_left()


@pytest.mark.parametrize(
    ("name", "n_requests"),
    [("rank2", 6), ("rank0", 0), ("core0", 6), ("core3", 6), ("core1", 0)],
)
def test_killed(server: GroupServer, name: str, n_requests: int) -> None:
    """core0 leads the group, rank0 is where the ranks meet."""
    running = streams(server, n_requests)
    assert server.shared_memory() == []
    victim = server.child(name)
    said = check_fault_and_return(server, running, victim.kill)
    cause = f"(pid {victim.pid}) was killed by SIGKILL"
    assert any(cause in text for text in said + [stream.text for stream in running]), said


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [(BROKEN, "the forward pass broke"), (CORE_BROKEN, "the scheduler broke")],
    ids=["rank", "core"],
)
def test_exception(server: GroupServer, prompt: list[int], cause: str) -> None:
    running = streams(server, 6)

    def inject() -> None:
        answer = server.complete(prompt=prompt)
        assert answer.status_code == 503
        assert f"RuntimeError: injected: {cause}" in answer.json()["error"]["message"]

    said = check_fault_and_return(server, running, inject)
    assert not [stream.text[-400:] for stream in running if cause not in stream.text]
    assert any(cause in text for text in said)


def test_a_victim_that_is_gone_before_the_group_is_back(server: GroupServer) -> None:
    """Killed again while it starts: the others wait for the next one."""

    def kill_twice() -> None:
        core, rank = server.child("core2"), server.child("rank2")
        core.kill()
        rank.wait(10)
        server.child("rank2").kill()

    check_fault_and_return(server, streams(server, 4), kill_twice)
    check_answers(server)


def test_a_rank_killed_in_an_exchange_over_gloo_is_named(model: Path, tmp_path: Path) -> None:
    """Those that wait for it only see a connection close."""
    with group_serving(model, tmp_path / "run", 2, *FLAGS, env={"FD_ALL_TO_ALL": "gloo"}) as server:
        running = streams(server, 4)
        victim = server.child("rank1")
        said = check_fault_and_return(server, running, victim.kill)
        assert all(f"rank 1 (pid {victim.pid}) was killed by SIGKILL" in stream.text for stream in running), said
