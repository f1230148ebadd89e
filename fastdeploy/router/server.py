"""Runs the router: the listening socket, the loops in the background, signals, the way down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fastdeploy.errors import InvalidRequest
from fastdeploy.observability.logs import CONSOLE
from fastdeploy.router.app import App
from fastdeploy.router.config import RouterConfig, load_instances
from fastdeploy.router.downstream import ClientConnection
from fastdeploy.router.health import HealthChecker
from fastdeploy.router.ledger import ServerLoad
from fastdeploy.router.metrics import RouterMetrics
from fastdeploy.router.peers import Peers, socket_path
from fastdeploy.router.placement import MixedPlacer, PairPlacer, Placer
from fastdeploy.router.policies import make_policy
from fastdeploy.router.proxy import Proxy
from fastdeploy.router.registry import Registry
from fastdeploy.router.workers import Group

LOGGER = logging.getLogger(__name__)
CONSOLE_LOGGER = logging.getLogger(CONSOLE)
SWEEP_S = 1.0
LAST_BYTES_S = 2.0
BACKLOG = 2048
CLOSING = "the router is shutting down"


class Signals:
    """Counts SIGTERM and SIGINT while the context is."""

    def __init__(self) -> None:
        self.n = 0
        self._came = asyncio.Event()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Installs the handlers for a while."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._note)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _note(self) -> None:
        self.n += 1
        self._came.set()

    async def next(self, timeout_s: float | None = None) -> None:
        """Until one comes, or the time is up."""
        self._came.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._came.wait()


@dataclass(frozen=True, slots=True)
class Router:
    """The parts of one router. Made inside a running event loop."""

    config: RouterConfig
    registry: Registry
    placer: Placer
    checker: HealthChecker
    proxy: Proxy
    app: App
    peers: Peers
    group: Group | None

    @classmethod
    def build(cls, config: RouterConfig, group: Group | None = None) -> Router:
        """Put the parts together. Raises `ConfigError` for an unknown policy or a bad `register-path` file.

        `group`: the other workers, when there are any.
        """
        registry, placer = _placing(config)
        checker = HealthChecker(registry, config.manager, any(policy.needs_remote for policy in placer.policies))
        metrics = RouterMetrics(registry, placer)
        proxy = Proxy(placer, config.pairs, checker, metrics, config.request_timeout_s)
        peers = Peers()
        if group is not None:
            registry.ledger.share = partial(group.loads.column, group.worker)
            numbers = [number for number in range(group.n_workers) if number != group.worker]
            peers = Peers([socket_path(group.folder, number) for number in numbers])
        _register_from_file(config, registry)
        return cls(
            config, registry, placer, checker, proxy, App(registry, checker, proxy, metrics, peers), peers, group
        )

    @asynccontextmanager
    async def listening(
        self, sock: socket.socket
    ) -> AsyncGenerator[tuple[asyncio.Server, list[asyncio.Task[None]]], None]:
        """Serves a bound socket inside the context, which gets the listener, and the loops in the background."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: ClientConnection(self.app, loop), sock=sock, backlog=BACKLOG)
        listeners = [listener]
        if self.group is not None:
            path = socket_path(self.group.folder, self.group.worker)
            path.unlink(missing_ok=True)  # of a worker before this one
            peer_side = self.app.for_peers
            listeners.append(await loop.create_unix_server(lambda: ClientConnection(peer_side, loop), str(path)))
            for record in await self.peers.records():
                await self.checker.admit(record)
        loops = (self.checker.run(), self._sweep(), self._tidy(), self._report())
        tasks = [loop.create_task(work) for work in loops]
        try:
            yield listener, tasks
        finally:
            for task in tasks:
                task.cancel()
            for one in listeners:
                one.close()
            for client in [*self.app.clients, *self.app.for_peers.clients]:
                client.abort()
            self.peers.close()
            self.registry.close()

    async def drain(self, signals: Signals) -> bool:
        """Takes no requests any more and lets those that run finish. False when told to hurry."""
        self.proxy.closing = CLOSING
        CONSOLE_LOGGER.info("shutting down: %d requests are running; a second signal ends them", self.proxy.n_in_flight)
        while self.proxy.n_in_flight and signals.n < 2:
            self.close_idle()
            await signals.next(0.05)
        self.proxy.stop(CLOSING)
        deadline_s = asyncio.get_running_loop().time() + LAST_BYTES_S
        while self.app.clients and asyncio.get_running_loop().time() < deadline_s:
            self.close_idle()
            await asyncio.sleep(0.02)
        return signals.n < 2

    def close_idle(self) -> None:
        """Close the connections of clients that ask nothing."""
        for client in list(self.app.clients):
            client.close_if_idle()

    async def _sweep(self) -> None:
        """Ends what takes too long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            self.proxy.expire(loop.time())
            for client in list(self.app.clients):
                client.close_if_idle(loop.time())

    async def _tidy(self) -> None:
        """Forgets what nobody needs any more."""
        while True:
            await asyncio.sleep(self.config.scheduler.eviction_interval_secs)
            self.placer.tidy(asyncio.get_running_loop().time())
            self.registry.forget_idle_loads()

    async def _report(self) -> None:
        """A line about the load now and then, when something happened."""
        n_before = 0
        while True:
            await asyncio.sleep(self.config.scheduler.stats_interval_secs)
            loads = [server.load for server in self.registry]
            n_now = sum(load.n_requests_total for load in loads)
            if n_now != n_before:
                n_before = n_now
                LOGGER.info("stats: %s", "; ".join(map(_shown, loads)))


async def serve(config: RouterConfig, sock: socket.socket, group: Group | None = None) -> bool:
    """Routes on a bound socket until a signal comes. The first one lets requests finish, the second ends them.

    `group`: what makes this process one of several workers.

    True when it came to an end in order. Raises `ConfigError` for a `register-path` file that cannot be read.
    """
    router, signals = Router.build(config, group), Signals()
    with signals.counted():
        stop = asyncio.create_task(signals.next())
        try:
            async with router.listening(sock) as (listener, loops):
                await asyncio.wait([stop, *loops], return_when=asyncio.FIRST_COMPLETED)
                for task in loops:
                    if task.done():
                        task.result()  # none ends by itself: this raises
                listener.close()
                return await router.drain(signals)
        finally:
            stop.cancel()


def _shown(load: ServerLoad) -> str:
    return f"{load.url} requests={load.n_requests} tokens={load.n_tokens} total={load.n_requests_total}"


def _placing(config: RouterConfig) -> tuple[Registry, Placer]:
    registry = Registry(is_split=config.server.splitwise)
    if config.server.splitwise:
        return registry, PairPlacer(registry, config.scheduler, config.pairs)
    return registry, MixedPlacer(registry, make_policy(config.scheduler, config.scheduler.policy))


def _register_from_file(config: RouterConfig, registry: Registry) -> None:
    """They get requests once their first health check succeeded."""
    if not config.manager.register_path:
        return
    records, problems = load_instances(config.manager.register_path)
    for line in problems:
        LOGGER.error(line)
    for record in records:
        try:
            registry.check_role(record)
        except InvalidRequest as exc:
            LOGGER.error("Failed to register instance: %s: %s", record.url, exc)
            continue
        registry.add(record, 0.0, is_well=False, is_static=True)
