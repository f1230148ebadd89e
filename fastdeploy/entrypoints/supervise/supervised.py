"""One server of the group through all its lives: started, followed, watched; what it said and whether it is ready."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from typing import Protocol

from fastdeploy.entrypoints.supervise.announce import Bound
from fastdeploy.entrypoints.supervise.backoff import Backoff
from fastdeploy.entrypoints.supervise.health import (
    DRAIN_SILENCE_S,
    POLL_S,
    POLL_STARTING_S,
    SILENCE_S,
    START_SILENCE_S,
    UNWELL_S,
    HealthWatch,
    ask,
)
from fastdeploy.entrypoints.supervise.plan import ServerSpec
from fastdeploy.entrypoints.supervise.report import Row
from fastdeploy.entrypoints.supervise.server_process import ServerProcess
from fastdeploy.errors import ConfigError, EngineDeadError, EngineStartError, FastDeployError

OUTPUT_FILE = "api_server.out"
REFUSED = 2  # exit status of an api_server that cannot have its port, or refuses another flag

_logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Who wants to know how far a server is."""

    def on_stage(self, server: SupervisedServer, stage: str) -> None:
        """It is starting and got this far."""

    def on_ready(self, server: SupervisedServer, first: bool) -> None:
        """It takes requests: for the first time, or again."""


class SupervisedServer:
    """`stopping` is set by its owner before a signal that ends it, `ready` while it takes requests."""

    def __init__(self, spec: ServerSpec, observer: Observer) -> None:
        self.spec = spec
        self.stopping = False
        self.ready = False
        self.was_ready = False
        self._observer = observer
        self._backoff = Backoff()
        self._ready_s = 0.0
        self._process: ServerProcess | None = None
        self._bound: Bound | None = None
        self._chosen: Bound | None = None

    @property
    def pid(self) -> int | None:
        """None while it is dead."""
        return self._process.pid if self._process else None

    async def live(self) -> FastDeployError:
        """One life, from start to death; the error that names it.

        Ports that a server chose itself are asked for again by its next life, unless one could not have them.
        """
        spec, chosen = self.spec, self._chosen
        port, metrics_port = (chosen.port, chosen.metrics_port) if chosen else (spec.port, spec.metrics_port)
        try:
            process = ServerProcess(spec.argv(port, metrics_port), spec.environ, spec.log_dir / OUTPUT_FILE)
        except OSError as exc:
            return EngineStartError(f"{spec.name} could not be started: {exc}")
        _logger.info("%s: pid %d", spec.name, process.pid)
        self._process, self._bound, self.ready = process, None, False
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._follow(process)), group.create_task(self._watch(process))]
                await process.ended()
                for helper in helpers:
                    helper.cancel()
        finally:
            self._process = None
        self._chosen = self._bound or (None if process.status == REFUSED else chosen)
        return self._death(process)

    def next_delay_s(self) -> float:
        """It is dead: seconds until it is to be started again."""
        ready_s = time.monotonic() - self._ready_s if self.ready else 0.0
        self.ready = False
        return self._backoff.next_delay_s(ready_s)

    def row(self) -> Row:
        """Its line of the table. It must be ready."""
        assert self._process is not None and self._bound is not None
        bound = self._bound
        return Row(self.spec.rank, bound.url, bound.metrics_url, self._process.pid, str(self.spec.log_dir))

    def send(self, number: signal.Signals) -> None:
        """A signal, if it is alive."""
        if self._process is not None:
            self._process.send(number)

    async def _follow(self, process: ServerProcess) -> None:
        async for announcement in process.announcements():
            if isinstance(announcement, Bound):
                self._bound = announcement
                _logger.info("%s: bound %s, metrics at %s", self.spec.name, announcement.url, announcement.metrics_url)
            else:
                first, self.ready, self.was_ready = not self.was_ready, True, True
                self._ready_s = time.monotonic()
                self._observer.on_ready(self, first)

    async def _watch(self, process: ServerProcess) -> None:
        """Polls /health for as long as the server lives, and kills it when the answers say so."""
        watch, phase = self._new_watch(), (self.ready, self.stopping)
        while True:
            poll_s = time.monotonic()
            if phase != (self.ready, self.stopping):
                watch, phase = self._new_watch(), (self.ready, self.stopping)
            answer = await ask(self._bound.url) if self._bound else None
            reason = watch.verdict(answer, time.monotonic())
            if reason is not None:
                _logger.error("%s (pid %d) %s and is killed", self.spec.name, process.pid, reason)
                process.send(signal.SIGKILL)
                return
            if answer is not None and answer.reason and not self.ready:
                self._observer.on_stage(self, answer.reason)
            next_s = poll_s + (POLL_S if self.ready else POLL_STARTING_S)
            await asyncio.sleep(max(next_s - time.monotonic(), 0.0))

    def _new_watch(self) -> HealthWatch:
        now_s = time.monotonic()
        if self.stopping:
            return HealthWatch(now_s, DRAIN_SILENCE_S)
        return HealthWatch(now_s, SILENCE_S, UNWELL_S) if self.ready else HealthWatch(now_s, START_SILENCE_S)

    def _death(self, process: ServerProcess) -> FastDeployError:
        """Before it was ever ready, its own errors are what there is to say; later, how it died."""
        if self.was_ready:
            return EngineDeadError(f"{self.spec.name} {process.describe_death()}")
        errors = process.errors()
        if not errors:
            return EngineStartError(f"{self.spec.name} {process.describe_death()}")
        kind = ConfigError if process.status == REFUSED else EngineStartError
        return kind("\n".join(f"{self.spec.name}: {line}" for line in errors))
