"""The supervisor over small stand-in servers: deaths, hangs, restarts, signals, and what is left at the end."""

import asyncio
import logging
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fastdeploy.entrypoints.supervise import backoff, health, supervised, supervisor
from fastdeploy.entrypoints.supervise.plan import GroupPlan, ServerSpec
from fastdeploy.entrypoints.supervise.report import Row, StartReport
from fastdeploy.entrypoints.supervise.supervisor import Supervisor
from fastdeploy.errors import ConfigError, EngineDeadError, EngineStartError

pytestmark = pytest.mark.timeout(60)

FAKE = Path(__file__).with_name("fake_server.py")
PATIENCE_S = 30.0


class Group:
    """A supervisor under test and what it reported."""

    def __init__(self, folder: Path, *options: str, n: int = 2, restarts: bool = True, drain_s: float | None = None):
        specs = [
            ServerSpec(
                index=i,
                rank=i,
                command=(sys.executable, str(FAKE), *options),
                port=0,
                metrics_port=0,
                environ=dict(os.environ),
                log_dir=folder / f"log_{i}",
            )
            for i in range(n)
        ]
        self.rows: list[Row] = []
        report = StartReport(n, interactive=False)
        report.on_all_ready = self._all_ready  # type: ignore[method-assign]
        self.supervisor = Supervisor(GroupPlan(servers=tuple(specs), restarts=restarts, drain_s=drain_s), report)
        self.up = asyncio.Event()

    def _all_ready(self, rows: list[Row]) -> None:
        self.rows = list(rows)
        self.up.set()

    def pid(self, index: int) -> int:
        """Of the server that lives there now, 0 if none does."""
        server = self.supervisor.servers[index]
        return (server.ready and server.pid) or 0

    async def get(self, index: int, path: str) -> None:
        """Ask a server for something; it may end without an answer."""

        def ask() -> None:
            with suppress(OSError), urllib.request.urlopen(self.rows[index].url + path, timeout=1) as answer:
                answer.read()

        await asyncio.to_thread(ask)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.02)


def run(group_of: Callable[[], Group], script: Callable[[Group], Awaitable[None]]) -> bool:
    """The supervisor's answer while `script` runs beside it; no child of this process is left."""

    async def both() -> bool:
        group = group_of()
        running = asyncio.create_task(group.supervisor.run())
        up = asyncio.create_task(group.up.wait())
        await asyncio.wait([running, up], return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
        up.cancel()
        if not running.done():
            await script(group)
        return await running

    before = psutil.Process().children()
    try:
        return asyncio.run(both())
    finally:
        left = [child for child in psutil.Process().children() if child not in before and child.status() != "zombie"]
        assert left == []


async def no_script(group: Group) -> None:
    raise AssertionError("it came up")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Short waits, and everything that is logged."""
    monkeypatch.setattr(backoff, "FIRST_S", 0.1)
    monkeypatch.setattr(supervised, "SILENCE_S", 1.0)
    monkeypatch.setattr(supervised, "UNWELL_S", 1.0)
    monkeypatch.setattr(supervised, "POLL_S", 0.1)
    caplog.set_level(logging.INFO, "fastdeploy")


def test_killed_server_is_named_and_comes_back_on_its_ports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def script(group: Group) -> None:
        first, other = group.pid(0), group.pid(1)
        os.kill(first, signal.SIGKILL)
        await until(lambda: group.pid(0) not in (0, first))
        row = group.supervisor.servers[0].row()
        assert (row.url, row.metrics_url) == (group.rows[0].url, group.rows[0].metrics_url)
        assert group.pid(1) == other
        assert f"server 0 (pid {first}) was killed by SIGKILL; its last lines in {tmp_path}/log_0" in caplog.text
        assert "\n  ready\n" in caplog.text
        terminate()

    assert run(lambda: Group(tmp_path), script)


def test_server_that_ends_by_itself_comes_back_later_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(group: Group) -> None:
        for _ in range(3):
            before = group.pid(1)
            await group.get(1, "/exit/3")
            await until(lambda before=before: group.pid(1) not in (0, before))
        terminate()

    assert run(lambda: Group(tmp_path), script)
    assert caplog.text.count("ended with status 3") == 3
    assert [round(float(record.args[1]), 3) for record in caplog.records if "started again" in record.msg] == [
        0.1,
        0.2,
        0.4,
    ]


@pytest.mark.parametrize(("path", "cause"), [("/mute", "did not answer"), ("/unwell", "with 503 for")])
def test_hung_server_is_killed_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str, cause: str
) -> None:
    monkeypatch.setattr(health.ask, "__defaults__", (0.3,))

    async def script(group: Group) -> None:
        before = group.pid(0)
        await group.get(0, path)
        await until(lambda: group.pid(0) not in (0, before))
        assert cause in caplog.text and f"server 0 (pid {before}) was killed by SIGKILL" in caplog.text
        terminate()

    assert run(lambda: Group(tmp_path), script)


def test_stopped_server_is_killed_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health.ask, "__defaults__", (0.3,))

    async def script(group: Group) -> None:
        before = group.pid(1)
        os.kill(before, signal.SIGSTOP)
        await until(lambda: group.pid(1) not in (0, before))
        assert "server 1" in caplog.text and "did not answer GET /health for" in caplog.text
        terminate()

    assert run(lambda: Group(tmp_path), script)


def test_without_restarts_a_death_ends_all(tmp_path: Path) -> None:
    async def script(group: Group) -> None:
        os.kill(group.pid(1), signal.SIGKILL)

    with pytest.raises(EngineDeadError, match=r"server 1 \(pid \d+\) was killed by SIGKILL"):
        run(lambda: Group(tmp_path, restarts=False), script)


@pytest.mark.parametrize(("status", "error"), [(1, EngineStartError), (2, ConfigError)])
def test_start_that_fails_is_told_once(tmp_path: Path, status: int, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        run(lambda: Group(tmp_path, "fails=--x 1: no", f"status={status}", n=4), no_script)
    assert str(caught.value) in [f"server {i}: --x 1: no" for i in range(4)]


def test_program_that_does_not_start(tmp_path: Path) -> None:
    def broken() -> Group:
        group = Group(tmp_path)
        object.__setattr__(group.supervisor.servers[0].spec, "command", ("/no/such/program",))
        return group

    with pytest.raises(EngineStartError, match=r"server 0 could not be started: .*No such file"):
        run(broken, no_script)


def test_first_signal_waits_for_servers_that_take_their_time(tmp_path: Path) -> None:
    async def script(group: Group) -> None:
        terminate()

    start_s = time.monotonic()
    assert run(lambda: Group(tmp_path, "drain_s=1.5"), script)
    assert time.monotonic() - start_s > 1.5


def test_second_signal_ends_what_does_not_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "HURRY_S", 0.3)

    async def script(group: Group) -> None:
        terminate()
        await asyncio.sleep(0.3)
        terminate()

    assert not run(lambda: Group(tmp_path, "drain_s=3600"), script)


def test_drain_has_a_limit_if_the_servers_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "HURRY_S", 0.2)
    monkeypatch.setattr(supervisor, "DRAIN_MARGIN_S", 0.2)

    async def script(group: Group) -> None:
        terminate()

    assert run(lambda: Group(tmp_path, "drain_s=3600", drain_s=0.2), script)


def test_stopped_server_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "DRAIN_SILENCE_S", 1.0)
    monkeypatch.setattr(health.ask, "__defaults__", (0.3,))

    async def script(group: Group) -> None:
        os.kill(group.pid(0), signal.SIGSTOP)
        terminate()

    assert run(lambda: Group(tmp_path), script)


def test_signal_while_a_server_waits_for_its_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 30.0)

    async def script(group: Group) -> None:
        os.kill(group.pid(0), signal.SIGKILL)
        await until(lambda: group.supervisor.servers[0].pid is None)
        terminate()

    assert run(lambda: Group(tmp_path), script)


def test_only_the_last_lines_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def script(group: Group) -> None:
        await group.get(0, "/crowd")
        before = group.pid(0)
        os.kill(before, signal.SIGKILL)
        await until(lambda: group.pid(0) not in (0, before))
        terminate()

    assert run(lambda: Group(tmp_path), script)
    assert "line 999" in caplog.text and "line 989" not in caplog.text
