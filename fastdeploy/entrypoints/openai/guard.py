"""Ends a request that nobody waits for, or that waits too long: client gone, no first token in time, engine silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from starlette.types import Receive

from fastdeploy.errors import EngineUnavailable, RequestTimeout


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Guard:
    """Async context around the work for one request: raises inside it, at its current await, when the work is in vain.

    Raises `ClientGone` when the client disconnects, `RequestTimeout` when `progress` was not called within `first_s`
    seconds, and `EngineUnavailable` when the engine was silent for `silence_s` seconds and `health` tells a reason.
    Waiting costs the work nothing: one task sleeps on the connection, one timer looks now and then.
    """

    def __init__(
        self,
        receive: Receive,
        first_s: float | None = None,
        silence_s: float | None = None,
        health: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._receive = receive
        self._first_s = first_s
        self._silence_s = silence_s
        self._health = health
        self._reason: Exception | None = None
        self._began = False
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Guard:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a Guard works inside a task")
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._moved_s = self._loop.time()
        self._watcher = asyncio.create_task(self._watch_client())
        self._arm(self._first_s if self._first_s is not None else self._silence_s)
        return self

    def progress(self) -> None:
        """The engine brought something."""
        self._moved_s = self._loop.time()
        if not self._began:
            self._began = True
            self._arm(self._silence_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._reason is not None and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise self._reason from None

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._interrupt(ClientGone())

    def _interrupt(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def _arm(self, after_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if after_s is None else self._loop.call_later(after_s, self._look)

    def _look(self) -> None:
        if not self._began and self._first_s is not None:
            self._interrupt(RequestTimeout(f"no token within {self._first_s:g} s (--max-waiting-time); retry later"))
            return
        silence_s = self._silence_s or 0.0
        left_s = self._moved_s + silence_s - self._loop.time()
        reason = self._health() if left_s <= 0 else None
        if reason is not None:
            self._interrupt(EngineUnavailable(f"the engine was silent for {silence_s:g} s: {reason}"))
            return
        self._arm(left_s if left_s > 0 else silence_s)
