"""Several workers of one router: loads that they share, registrations that they pass on, workers that die."""

import asyncio
import json
import os
import re
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from router_harness import PATIENCE_S, Client, FakeServer, Writer, until, whole

from fastdeploy.errors import ConfigError, FastDeployError
from fastdeploy.router.ledger import Ledger, Ticket
from fastdeploy.router.metrics import Figures, ServerFigures, added, rendered, shown
from fastdeploy.router.shared_loads import SharedLoads
from fastdeploy.router.workers import bind_group

pytestmark = pytest.mark.timeout(120)


def test_loads_of_all_workers_are_seen(tmp_path: Path) -> None:
    table = SharedLoads(2, tmp_path / "lock", max_servers=2)
    a, b = (Ledger(share=lambda url, worker=worker: table.column(worker, url)) for worker in (0, 1))
    here, there = a.joined("http://x"), b.joined("http://x")
    assert here.shared is not None
    tickets = [Ticket(here, 10, True), Ticket(there, 5, False), Ticket(there, 7, True)]
    tickets[2].events(2)
    for load in (here, there):
        load.see_others()
        assert (load.n_requests, load.n_waiting, load.n_tokens) == (3, 1, 24)
    for ticket in tickets:
        ticket.end()
        ticket.end()
    for load in (here, there):
        load.see_others()
        assert (load.n_requests, load.n_waiting, load.n_tokens) == (0, 0, 0)
    a.joined("http://y")
    with pytest.raises(FastDeployError, match="more than 2 servers"):
        a.joined("http://z")
    b.forget_idle(set())
    a.forget_idle({"http://y"})
    assert a.joined("http://z").n_requests == 0, "a column that nobody knows any more is free"


def test_a_dead_worker_leaves_no_load(tmp_path: Path) -> None:
    table = SharedLoads(2, tmp_path / "lock")
    a, b = (Ledger(share=lambda url, worker=worker: table.column(worker, url)) for worker in (0, 1))
    load = a.joined("http://x")
    Ticket(b.joined("http://x"), 9, True)
    load.see_others()
    assert load.n_requests == 1
    table.clear(1)
    load.see_others()
    assert (load.n_requests, load.n_waiting, load.n_tokens) == (0, 0, 0)


def test_figures_are_added_up() -> None:
    key = (b"POST", b"/v1/completions", 200)
    counts = dict.fromkeys(("in_flight", "retries", "preempted", "clients_gone", "cache_asked", "cache_hits"), 2)
    part = Figures(
        http={key: 3},
        failures={("http://x", "connect"): 1},
        servers={"http://x": ServerFigures("mixed", True, 4, 1, 50, 7, 8)},
        counts=counts,
    )
    total = added([part, part])
    assert (total.http[key], total.counts["retries"]) == (6, 4)
    assert (total.servers["http://x"].n_requests, total.servers["http://x"].n_events_total) == (4, 16)
    assert b'http_requests_total{endpoint="/v1/completions",method="POST",status_code="200"} 6.0' in rendered(total)
    (server,) = shown(total)["servers"]
    assert (server["url"], server["n_failures"]) == ("http://x", 2)


def test_a_port_is_shared_by_workers_only() -> None:
    with ExitStack() as stack:
        first, second = bind_group(stack, "127.0.0.1", 0, 2)
        assert first.getsockname() == second.getsockname()
        for n in (1, 2):
            with pytest.raises(ConfigError, match="--port"):
                bind_group(stack, "127.0.0.1", first.getsockname()[1], n)


class WorkersRun:
    """`fd-router --workers 2` as a process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.port = process, port

    async def ask(self, method: str, target: bytes, body: bytes = b"") -> tuple[int, bytes]:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            status, _, answer = await client.ask(method, target, body)
            return status, answer
        finally:
            client.writer.close()

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def n_seen(self, role: str = "mixed") -> set[int]:
        """Numbers of servers that connections find; each reaches any of the workers."""
        answers = [await self.ask("GET", b"/registered_number") for _ in range(16)]
        return {json.loads(body)[role] for _, body in answers}


@asynccontextmanager
async def two_workers(folder: Path) -> AsyncIterator[WorkersRun]:
    command = [sys.executable, "-m", "fastdeploy.router.launch", "--host", "127.0.0.1", "--port", "0", "--workers", "2"]
    env = {**os.environ, "FD_LOG_DIR": str(folder)}
    process = await asyncio.create_subprocess_exec(*command, env=env, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            found = None
            while found is None:
                line = (await process.stderr.readline()).decode()
                assert line, "the router ended"
                found = re.search(r"Starting server on http://127.0.0.1:(\d+),", line)
        yield WorkersRun(process, int(found[1]))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_two_workers_are_one_router(tmp_path: Path) -> None:
    async def slow(request: dict[str, Any], writer: Writer) -> None:
        await asyncio.sleep(0.3)
        writer.write(whole(b"{}"))

    async def register(run: WorkersRun, server: FakeServer) -> int:
        body = json.dumps({"role": "mixed", "host_ip": "127.0.0.1", "port": server.port}).encode()
        return (await run.ask("POST", b"/register", body))[0]

    async def main() -> None:
        servers = [FakeServer(slow) for _ in range(4)]
        for server in servers:
            await server.start()
        async with two_workers(tmp_path) as run:
            await until(lambda: len(run.children()) == 2)
            assert [await register(run, server) for server in servers] == [200] * 4
            async with asyncio.timeout(PATIENCE_S):  # a worker learns of what another was told a moment later
                while await run.n_seen() != {4}:
                    await asyncio.sleep(0.1)
            body = b'{"prompt": "x"}'
            await asyncio.gather(*(run.ask("POST", b"/v1/completions", body) for _ in range(40)))
            n_asked = [server.n_asked for server in servers]
            assert sum(n_asked) == 40
            assert max(n_asked) - min(n_asked) <= 6, "workers do not see each other's requests"
            page = (await run.ask("GET", b"/metrics"))[1].decode()
            assert 'http_requests_total{endpoint="/v1/completions",method="POST",status_code="200"} 40.0' in page
            for target, text in ((b"/", b"<title>fd-router"), (b"/static/router.js", b"refresh()")):
                status, answer = await run.ask("GET", target)
                assert (status, text in answer) == (200, True)
            dead = run.children()[0]
            os.kill(dead, signal.SIGKILL)
            await until(lambda: dead not in run.children() and len(run.children()) == 2, "another worker")
            async with asyncio.timeout(PATIENCE_S):
                while await run.n_seen() != {4}:
                    await asyncio.sleep(0.1)
            assert {(await run.ask("POST", b"/v1/completions", body))[0] for _ in range(8)} == {200}
            children = run.children()
            run.process.terminate()
            assert await asyncio.wait_for(run.process.wait(), PATIENCE_S) == 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in children)
        for server in servers:
            await server.stop()

    asyncio.run(main())


def test_workers_do_not_survive_their_parent(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_workers(tmp_path) as run:
            await until(lambda: len(run.children()) == 2)
            children = run.children()
            run.process.kill()
            await run.process.wait()
            await until(lambda: not any(alive(pid) for pid in children), "the end of the workers")
            with pytest.raises(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{run.port}/health", timeout=5)

    asyncio.run(main())


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
