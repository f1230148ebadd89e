"""Runs the app: sockets, the engine behind it, signals, the way down.

The port is bound first and served at once: while the engine loads, /health answers 503 with the stage, and a busy port
is an error before anything is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp

from fastdeploy.entrypoints.openai.state import ServerState
from fastdeploy.entrypoints.stop_signals import StopSignals
from fastdeploy.errors import ConfigError
from fastdeploy.observability.logs import CONSOLE

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import Generator

LOGGER = logging.getLogger(__name__)
CONSOLE_LOGGER = logging.getLogger(CONSOLE)
BACKLOG = 2048
KEEP_ALIVE_S = 60
LAST_BYTES_S = 5  # for answers on their way out when nothing runs any more
POLL_S = 0.05

EngineContext = AbstractAsyncContextManager["Generator"]


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening TCP socket. Raises `ConfigError` naming the flag and the port when that cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as exc:
        raise ConfigError(f"--host {host}: {exc}") from exc
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise ConfigError(f"{flag} {port}: {exc.strerror} ({host}); choose another port with {flag}") from exc
    sock.setblocking(False)
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL at which a bound socket is reached from this machine."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: `HttpServer` decides when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The HTTP side of one engine, from the first byte served to the last."""

    def __init__(self, state: ServerState, listeners: Sequence[tuple[ASGIApp, socket.socket]], drain_s: float) -> None:
        """`drain_s`: what running requests get to finish after the first signal; 0 is no limit."""
        self._state = state
        self._drain_s = drain_s or None
        self._servers = [(_Uvicorn(_uvicorn_config(app)), sock) for app, sock in listeners]
        self._release = asyncio.Event()

    async def run(self, start_engine: Callable[[], EngineContext], on_up: Callable[[Generator], None]) -> bool:
        """Serves until a signal comes; `on_up` is called when the engine takes requests.

        The first signal lets running requests finish, the second ends them. True when it came to an end in order.
        Raises what `start_engine` raises, and the error of an engine that dies later.
        """
        serving = [asyncio.create_task(server.serve(sockets=[sock])) for server, sock in self._servers]
        engine = asyncio.create_task(self._hold_engine(start_engine, on_up))
        in_order = True
        try:
            with StopSignals() as signals:
                await _any_of([engine, *serving], signals.wait_for(1))
                if signals.n:
                    in_order = await self._drain(engine, signals)
        finally:
            self._state.closing = self._state.closing or "the engine has stopped"
            await self._end(engine, serving)
        return in_order

    async def _hold_engine(self, start_engine: Callable[[], EngineContext], on_up: Callable[[Generator], None]) -> None:
        """Keeps the engine until it is released. Raises its error when it dies before."""
        async with start_engine() as generator:
            self._state.generator = generator
            on_up(generator)
            death = asyncio.create_task(generator.died())
            await _any_of([death], self._release.wait())
            if death.done():
                raise death.result()
            death.cancel()

    async def _drain(self, engine: asyncio.Task[None], signals: StopSignals) -> bool:
        """Takes no requests any more, lets the running ones finish, aborts what is left. False when told to hurry."""
        state = self._state
        state.closing = "the server is shutting down"
        if state.generator is None:
            return True
        CONSOLE_LOGGER.info("shutting down: %d requests are running; a second signal ends them", state.slots.n_used)
        await _any_of([engine], signals.wait_for(2), self._all_answered(), timeout_s=self._drain_s)
        if state.slots.n_used and not engine.done():
            LOGGER.warning("shutting down: %d requests have not finished and are aborted", state.slots.n_used)
            state.abort(state.live.ids())
            await _any_of([engine], self._all_answered(), timeout_s=0.5 if signals.n > 1 else LAST_BYTES_S)
        for server, _ in self._servers:
            server.force_exit = signals.n > 1
        return signals.n < 2

    async def _all_answered(self) -> None:
        while self._state.slots.n_used:
            await asyncio.sleep(POLL_S)

    async def _end(self, engine: asyncio.Task[None], serving: list[asyncio.Task[None]]) -> None:
        """Stops HTTP, then the engine. Raises the first error that one of them ended with."""
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.wait(serving)
        self._release.set()
        stopped_early = self._state.generator is None and engine.cancel()
        await asyncio.wait([engine])
        if not (stopped_early and engine.cancelled()):
            engine.result()
        for task in serving:
            task.result()


def _uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )


async def _any_of(
    tasks: Sequence[asyncio.Task[Any]], *waits: Coroutine[Any, Any, object], timeout_s: float | None = None
) -> None:
    """Until one of them is done or the time is up; `waits` are given up then, `tasks` are left alone."""
    own = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait([*tasks, *own], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in own:
            task.cancel()
