"""Looks after the servers in the background: health checks, heartbeats that stop, figures for remote policies."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastdeploy.router.ledger import RemoteFigures
from fastdeploy.router.record import Record
from fastdeploy.router.registry import Registry, Server
from fastdeploy.router.upstream import KEEP_IDLE_S, Upstream, UpstreamError, fetch

LOGGER = logging.getLogger(__name__)
POLL_S = 1.0  # how often servers are asked for their figures
POLL_TIMEOUT_S = 2.0
REGISTER_CHECK_S = 3.0  # how long a server that registers may take to say that it is well
LONGEST_PAUSE_S = 5.0

_FIGURE = re.compile(rb"^fastdeploy:num_requests_(running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerSettings:
    """The section `manager` of the configuration file."""

    register_path: str = ""
    health_failure_threshold: int = 1
    health_success_threshold: int = 1
    health_check_timeout_secs: float = 5
    health_check_interval_secs: float = 5
    health_check_endpoint: str = "/health"


class HealthChecker:
    """Decides who is well. `run` is the loop; `suspect` and `admit` are called when something happens in between."""

    def __init__(self, registry: Registry, settings: ManagerSettings, polls: bool, idle_s: float = KEEP_IDLE_S) -> None:
        """`polls`: whether the servers' own figures are wanted."""
        self._registry = registry
        self._settings = settings
        self._polls = polls
        self._idle_s = idle_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspected: set[str] = set()
        self.now_s: Callable[[], float] = asyncio.get_running_loop().time

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._every(self._settings.health_check_interval_secs, self.check_all))
                if self._polls:
                    group.create_task(self._every(POLL_S, self._poll_all))
        finally:
            for task in self._tasks:
                task.cancel()

    async def _every(self, seconds: float, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await look()
            await asyncio.sleep(seconds)

    async def check_all(self) -> None:
        """Look at all servers at once."""
        self._registry.expire(self.now_s())
        looked_at = [server for server in self._registry if server.url not in self._suspected]
        await asyncio.gather(*(self._check(server) for server in looked_at))
        for server in self._registry:
            server.upstream.close_idle(self.now_s() - self._idle_s)
            server.metrics.close_idle(self.now_s() - self._idle_s)

    async def admit(self, record: Record) -> str | None:
        """Take in a server that registers and is not known to be well; returns why not, None when it is in."""
        known = self._registry.find(record.url)
        upstream = known.upstream if known is not None else Upstream(record.host_ip, int(record.port))
        timeout_s = min(REGISTER_CHECK_S, self._settings.health_check_timeout_secs)
        reason = None
        for _ in range(self._settings.health_success_threshold):
            reason = reason or await self._look(upstream, timeout_s)
        if known is None:
            upstream.close()
        if reason is None:
            self._registry.add(record, self.now_s(), is_well=True)
        return reason

    def suspect(self, server: Server, reason: str) -> None:
        """A request failed in a way that is the server's fault: nothing goes there until it was looked at.

        The look comes at once after the first failure and later after each one that follows without a success.
        """
        self._registry.unwell(server, reason)
        if server.url in self._suspected:
            return
        pause_s = min(0.1 * 2**server.n_failures - 0.1, LONGEST_PAUSE_S)
        server.n_failures += 1
        self._suspected.add(server.url)
        self._start(self._check_suspect(server, pause_s))

    def look_at(self, server: Server) -> None:
        """The server refused a request: look at it soon, but let others try."""
        if server.url not in self._suspected:
            self._suspected.add(server.url)
            self._start(self._check_suspect(server, 0.0))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check_suspect(self, server: Server, pause_s: float) -> None:
        try:
            await asyncio.sleep(pause_s)
            await self._check(server)
        finally:
            self._suspected.discard(server.url)

    async def _check(self, server: Server) -> None:
        reason: str | None = ""
        for _ in range(self._settings.health_failure_threshold):
            reason = await self._look(server.upstream, self._settings.health_check_timeout_secs)
            if reason is None:
                break
        if reason is not None:
            self._registry.failed_check(server, reason)
            return
        for _ in range(0 if server.is_well else self._settings.health_success_threshold - 1):
            if await self._look(server.upstream, self._settings.health_check_timeout_secs) is not None:
                return
        self._registry.well(server)

    async def _look(self, upstream: Upstream, timeout_s: float) -> str | None:
        """Why the server at that address is not well, None when it is."""
        try:
            answer = await fetch(upstream, b"GET", self._settings.health_check_endpoint.encode(), timeout_s)
        except UpstreamError as exc:
            return f"health check: {exc}"
        return None if answer.status == 200 else f"health check: status {answer.status}"

    async def _poll_all(self) -> None:
        await asyncio.gather(*(self._poll(server) for server in self._registry))

    async def _poll(self, server: Server) -> None:
        load = server.load
        n_then = load.n_requests
        try:
            answer = await fetch(server.metrics, b"GET", b"/metrics", POLL_TIMEOUT_S)
        except UpstreamError as exc:
            LOGGER.debug("%s: no figures: %s", server.url, exc)
            load.remote = None
            return
        load.remote = figures_of(answer.body, n_then) if answer.status == 200 else None


def figures_of(text: bytes, n_requests_then: int) -> RemoteFigures | None:
    """The figures in a page of metrics, None when it lacks one."""
    try:
        found = {name: round(float(value)) for name, value in _FIGURE.findall(text)}
        return RemoteFigures(found[b"running"], found[b"waiting"], n_requests_then)
    except (KeyError, ValueError, OverflowError):
        return None
