"""Keeps a group of servers: starts all, brings back who dies, drains all at a signal, leaves none behind."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

from fastdeploy.entrypoints.stop_signals import StopSignals
from fastdeploy.entrypoints.supervise.plan import GroupPlan
from fastdeploy.entrypoints.supervise.report import StartReport
from fastdeploy.entrypoints.supervise.supervised import SupervisedServer
from fastdeploy.errors import FastDeployError
from fastdeploy.observability.logs import CONSOLE

DRAIN_MARGIN_S = 30.0  # what a server needs to end besides its --timeout-graceful-shutdown
FAILED_STOP_S = 30.0
HURRY_S = 10.0

_logger = logging.getLogger(__name__)
_console = logging.getLogger(CONSOLE)

Keeper = asyncio.Task[FastDeployError | None]


class Supervisor:
    """All `servers` of a plan. `run` is to be called once, by the main thread: the servers end with it."""

    def __init__(self, plan: GroupPlan, report: StartReport) -> None:
        self._plan = plan
        self._report = report
        self.servers = [SupervisedServer(spec, self) for spec in plan.servers]
        self._stopping = asyncio.Event()
        self._all_shown = False

    async def run(self) -> bool:
        """Until a signal comes, and all servers have ended. True when they were given the time they needed.

        Raises the error of a server that never got ready, or, without restarts, of the first that died.
        """
        keepers = [asyncio.create_task(self._keep(server)) for server in self.servers]
        try:
            with StopSignals() as signals:
                stop = asyncio.create_task(signals.wait_for(1))
                await asyncio.wait([stop, *keepers], return_when=asyncio.FIRST_COMPLETED)
                stop.cancel()
                failure = next((keeper.result() for keeper in keepers if keeper.done()), None)
                in_order = await self._stop(keepers, signals, failed=failure is not None)
        finally:
            self._report.close()
            for server in self.servers:
                server.send(signal.SIGKILL)
        if failure is not None:
            raise failure
        return in_order

    def on_stage(self, server: SupervisedServer, stage: str) -> None:
        """Shown during the first start."""
        if not server.was_ready and not self._stopping.is_set():
            self._report.on_stage(server.spec.name, stage)

    def on_ready(self, server: SupervisedServer, first: bool) -> None:
        """The table comes when all are."""
        row = server.row()
        if first:
            self._report.on_ready(server.spec.name, row.url)
        else:
            _console.info("%s is back at %s, pid %d", server.spec.name, row.url, row.pid)
        if not self._all_shown and all(one.ready for one in self.servers):
            self._all_shown = True
            self._report.on_all_ready([one.row() for one in self.servers])

    async def _keep(self, server: SupervisedServer) -> FastDeployError | None:
        """One server, life after life. The error for which the whole group is to stop, None when it was told to."""
        while True:
            death = await server.live()
            if self._stopping.is_set():
                return None
            if not server.was_ready or not self._plan.restarts:
                return death
            delay_s = server.next_delay_s()
            _logger.error("%s", death)
            _console.info("%s is started again in %.0f s", server.spec.name, delay_s)
            try:
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            except TimeoutError:
                continue
            return None

    async def _stop(self, keepers: Sequence[Keeper], signals: StopSignals, *, failed: bool) -> bool:
        """Ends all: first they may drain, then they must hurry, then they are killed. False if told to hurry."""
        self._stopping.set()
        drain_s = None if self._plan.drain_s is None else self._plan.drain_s + DRAIN_MARGIN_S
        if failed:
            drain_s = FAILED_STOP_S
        else:
            _console.info("shutting down: running requests finish; a second signal ends them")
        if not await self._ended(keepers, signals, 1 if failed else 2, drain_s):
            await self._ended(keepers, signals, signals.n + 1, HURRY_S)
        if any(not keeper.done() for keeper in keepers):
            _logger.error("servers that have not ended are killed")
            for server in self.servers:
                server.send(signal.SIGKILL)
            await asyncio.wait(keepers)
        return signals.n < 2

    async def _ended(
        self, keepers: Sequence[Keeper], signals: StopSignals, n_signals: int, patience_s: float | None
    ) -> bool:
        """Tells all to end; waits for it, or until `n_signals` have come, or the time is up. Whether they have."""
        for server in self.servers:
            server.stopping = True
            server.send(signal.SIGTERM)
        waits = [asyncio.create_task(asyncio.wait(keepers)), asyncio.create_task(signals.wait_for(n_signals))]
        try:
            await asyncio.wait(waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return all(keeper.done() for keeper in keepers)
