"""Any process of a server killed, idle or loaded: every request ends, the cause is told, nothing is left."""

import signal
from pathlib import Path

import pytest
from processes import Server, serving, streams

pytestmark = pytest.mark.timeout(120)

FLAGS = ("--max-model-len", "4096")


def last_line(server: Server) -> str:
    return server.console.splitlines()[-1]


@pytest.mark.parametrize("n_requests", [0, 8])
@pytest.mark.parametrize("who", ["rank", "core"])
def test_killed_child(model: Path, tmp_path: Path, who: str, n_requests: int) -> None:
    with serving(model, tmp_path / "run", *FLAGS) as server:
        assert len(server.tree()) == 3 and server.shared_memory() == []
        running = streams(server, n_requests)
        victim = server.rank if who == "rank" else server.core
        victim.kill()
        assert server.end(10) == 1
        name = "rank 0" if who == "rank" else "engine core0"
        cause = f"{name} (pid {victim.pid}) was killed by SIGKILL"
        assert last_line(server) == f"fastdeploy: error: {cause}"
        for stream in running:
            stream.join(10)
            assert stream.failed and cause in stream.text
        server.check_nothing_left()


@pytest.mark.parametrize("n_requests", [0, 8])
def test_killed_front_end(model: Path, tmp_path: Path, n_requests: int) -> None:
    with serving(model, tmp_path / "run", *FLAGS) as server:
        running = streams(server, n_requests)
        server.tree()
        server.popen.kill()
        assert server.end(10) == -signal.SIGKILL
        for stream in running:
            stream.join(10)
            assert stream.ended.startswith("cut")
        server.check_nothing_left()


@pytest.mark.parametrize("who", ["fastdeploy.engine.core", "fastdeploy.executor.worker"])
def test_killed_while_it_starts(model: Path, tmp_path: Path, who: str) -> None:
    server = Server(model, tmp_path / "run", *FLAGS)
    try:
        server.find(who).kill()
        assert server.end(30) == 1
        assert "was killed by SIGKILL" in last_line(server)
        server.check_nothing_left()
    finally:
        server.kill()


def test_front_end_killed_while_it_starts(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path / "run", *FLAGS)
    try:
        assert server.rank
        server.popen.kill()
        assert server.end() == -signal.SIGKILL
        server.check_nothing_left()
    finally:
        server.kill()
