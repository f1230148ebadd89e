"""The ends of a server of several replicas, and what replicas without shared experts have to do with each other."""

import signal
from pathlib import Path

import httpx
import pytest
from group_server import BACK_S, ENDED_S, FLAGS, GroupServer, check_answers, group_serving, reason
from processes import PATIENCE_S, streams, wait_for

pytestmark = pytest.mark.timeout(240)

ALONE = FLAGS[:-1]  # without expert parallelism


def check_dead_for_good(server: GroupServer, cause: str) -> None:
    assert server.end(20) == 1
    errors = [line for line in server.console.splitlines() if line.startswith("fastdeploy: error: ")]
    assert len(errors) == 1 and cause in errors[0], server.console
    server.check_nothing_left()


def test_without_restart_the_server_ends_with_the_cause(model: Path, tmp_path: Path) -> None:
    with group_serving(model, tmp_path / "run", 2, *FLAGS, "--restart", "never") as server:
        running = streams(server, 4)
        victim = server.child("rank1")
        victim.kill()
        for stream in running:
            stream.join(ENDED_S)
            assert not stream.is_alive() and stream.failed
        check_dead_for_good(server, f"rank 1 (pid {victim.pid}) was killed by SIGKILL")


def test_sigterm_lets_requests_finish_on_all_ranks(model: Path, tmp_path: Path) -> None:
    """Answers of different lengths: ranks that are done still serve the others' experts."""
    with group_serving(model, tmp_path / "run", 4, *FLAGS) as server:
        running = [stream for i in range(8) for stream in streams(server, 1, max_tokens=20 + 25 * i)]
        server.popen.terminate()
        assert server.end() == 0
        for stream in running:
            stream.join(10)
            assert not stream.failed and stream.text.count('"finish_reason":"length"') == 1
        server.check_nothing_left()


def test_killed_front_end_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with group_serving(model, tmp_path / "run", 2, *FLAGS) as server:
        running = streams(server, 4)
        server.child("rank0").suspend()  # cannot notice the end of its lifeline
        server.tree()
        server.popen.kill()
        assert server.end() == -signal.SIGKILL
        for stream in running:
            stream.join(10)
            assert stream.ended.startswith("cut")
        server.check_nothing_left()


def test_sigterm_while_the_group_is_being_started_again(model: Path, tmp_path: Path) -> None:
    with group_serving(model, tmp_path / "run", 2, *FLAGS) as server:
        server.child("core1").kill()
        wait_for(lambda: reason(server), ENDED_S, "health to turn false")
        server.tree()
        server.popen.terminate()
        assert server.end(30) == 0
        server.check_nothing_left()


def test_replicas_without_shared_experts_die_alone(model: Path, tmp_path: Path) -> None:
    with group_serving(model, tmp_path / "run", 2, *ALONE) as server:
        running = streams(server, 6, max_tokens=400)
        victim = server.child("core1")
        victim.kill()
        wait_for(lambda: sum(not stream.is_alive() for stream in running) == 3, ENDED_S, "three requests to end")
        assert reason(server) == ""  # the other serves
        failed = [stream for stream in running if not stream.is_alive()]
        gauge = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
        assert 'dp_rank_running_requests{dp_rank="1"} 0.0' in gauge
        assert all(stream.failed and f"(pid {victim.pid}) was killed by SIGKILL" in stream.text for stream in failed)
        check_answers(server)
        for stream in set(running) - set(failed):
            stream.join(60)
            assert not stream.failed and stream.text.count('"finish_reason":"length"') == 1
        wait_for(lambda: "data-parallel rank 1 serves again" in log(server), BACK_S, "the dead replica to come back")
        check_answers(server)
        server.popen.terminate()
        assert server.end() == 0
        server.check_nothing_left()


def test_all_replicas_dead_is_told_and_mended(model: Path, tmp_path: Path) -> None:
    with group_serving(model, tmp_path / "run", 2, *ALONE) as server:
        running = streams(server, 4)
        for name in ("rank0", "core1"):
            server.child(name).kill()
        wait_for(lambda: reason(server), ENDED_S, "health to turn false")
        for stream in running:
            stream.join(ENDED_S)
            assert not stream.is_alive() and stream.failed
        wait_for(lambda: not reason(server), BACK_S, "health to turn true again")
        check_answers(server)


def log(server: GroupServer) -> str:
    """All that the front end wrote."""
    return server.console + "".join(file.read_text() for file in (server.folder / "log").glob("api_server*"))
