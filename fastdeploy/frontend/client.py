"""The front end's side of one engine core: starts it, sends requests, hands out what comes back, notices its death.

Bringing a dead core back is `Replica`'s business; choosing among several is the `Coordinator`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from fastdeploy import errors
from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import EngineDeadError, EngineError, EngineUnavailable, FastDeployError
from fastdeploy.frontend.ledger import RankLoad
from fastdeploy.wire.channel import FrontEndChannel, new_endpoint, new_keys
from fastdeploy.wire.child import Child
from fastdeploy.wire.messages import (
    Abort,
    CoreBoot,
    EngineFailed,
    GroupAddress,
    Hello,
    LoadProgress,
    Ready,
    Rearrange,
    Shutdown,
    Siblings,
    Status,
    StepOutput,
    Submit,
    TokenDelta,
    Withdraw,
    Withdrawn,
)

_SILENCE_LIMIT_S = 5.0  # a core reports every second
_STOP_PATIENCE_S = 5.0
_LEAVE_PATIENCE_S = 600.0
_CUT_PATIENCE_S = 2.0

log = logging.getLogger("fastdeploy.client")


class EngineProcess:
    """An engine core that this process started, and how to reach it. To be made by the thread of its event loop.

    Nothing here uses a thread: there are none to be had while the interpreter exits, which is when `LLM` stops.
    """

    def __init__(self, config: EngineConfig, group: GroupAddress | None) -> None:
        self.endpoint = new_endpoint()
        self.public_key, secret_key = new_keys()
        name = f"core{config.parallel.data_rank}"
        # In a group the core goes on for as long as others need its ranks.
        self._stop_patience_s = _STOP_PATIENCE_S if group is None else _LEAVE_PATIENCE_S
        boot = CoreBoot(config, group, self.endpoint, secret_key, self.public_key)
        self.child = Child(f"engine {name}", "fastdeploy.engine.core", boot, Path(config.log_dir) / f"{name}.out")

    async def ended(self) -> None:
        """Waits until the core's process is gone."""
        if self.child.process.poll() is not None:
            return
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        fd = os.pidfd_open(self.child.process.pid)
        loop.add_reader(fd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    async def stop(self, *, asked: bool) -> None:
        """Wait for the core, which stops its ranks first, then end what is left. `asked`: it was told to stop."""
        if not asked:
            self.child.cut()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended(), self._stop_patience_s if asked else _CUT_PATIENCE_S)
        self.child.stop(0.0)


class Sink(Protocol):
    """What takes the deltas of a request."""

    def put(self, delta: TokenDelta) -> None:
        """Called for each delta, on the event loop."""

    def fail(self, error: FastDeployError) -> None:
        """No more deltas will come."""


class Inbox:
    """Where the deltas of one or more engine requests gather until their reader takes them."""

    def __init__(self) -> None:
        self._deltas: list[TokenDelta] = []
        self._error: FastDeployError | None = None
        self._wake = asyncio.Event()

    def put(self, delta: TokenDelta) -> None:
        """Called by the client for each delta."""
        self._deltas.append(delta)
        self._wake.set()

    def fail(self, error: FastDeployError) -> None:
        """No more deltas will come; `take` raises."""
        self._error = error
        self._wake.set()

    async def take(self) -> list[TokenDelta]:
        """All deltas since the last call, at least one. Raises the error the engine died with."""
        await self._wake.wait()
        self._wake.clear()
        deltas, self._deltas = self._deltas, []
        if not deltas:
            assert self._error is not None
            raise EngineUnavailable(f"the engine stopped: {self._error}")
        if self._error is not None:
            self._wake.set()
        return deltas


class EngineClient:
    """Requests to one engine core, on one event loop."""

    def __init__(
        self,
        engine: EngineProcess,
        stall_limit_s: float,
        on_status: Callable[[Status], None],
        on_withdrawn: Callable[[list[tuple[Submit, Sink]]], None],
    ) -> None:
        self.load = RankLoad()
        self._engine = engine
        self._stall_limit_s = stall_limit_s
        self._on_status = on_status
        self._on_withdrawn = on_withdrawn
        self._channel = FrontEndChannel(engine.endpoint, engine.public_key)
        self._inboxes: dict[str, Sink] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._unsent: list[Submit | Abort | Withdraw | Siblings | Rearrange] = []
        self._sends: set[asyncio.Task[None]] = set()
        self._death: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()
        self._status: Status | None = None
        self._heard_s = 0.0
        self._serving = False

    async def connect(self, on_progress: Callable[[LoadProgress], None]) -> Ready:
        """Wait until the engine takes requests. Raises the error that it failed to start with."""
        self._heard_s = time.monotonic()
        ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._receive(ready, on_progress), name="engine events"),
            asyncio.create_task(self._watch(), name="engine process"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._check_end)
        await self._channel.send(Hello())
        waits: list[asyncio.Future[Any]] = [ready, self._death]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise self._death.result()
        self._serving = True
        return ready.result()

    def submit(self, request: Submit, inbox: Sink) -> None:
        """Send a request whose deltas go to `inbox`. Raises EngineUnavailable when the engine is gone."""
        self._check_alive()
        self._inboxes[request.request_id] = inbox
        self.load.add(request)
        self._send(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests that still run; their inbox gets a last delta with finish reason "abort"."""
        alive = [request_id for request_id in request_ids if request_id in self._inboxes]
        if alive and not self._death.done():
            self._send(Abort(alive))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Abort requests nobody reads any more."""
        request_ids = list(request_ids)
        self.abort(request_ids)
        for request_id in request_ids:
            if self._inboxes.pop(request_id, None) is not None:
                self.load.drop(request_id)

    def withdraw(self, n_requests: int) -> None:
        """Ask for up to so many requests back that never ran; they come to `on_withdrawn`."""
        if not self._death.done():
            self._send(Withdraw(n_requests))

    def rearrange(self) -> None:
        """Ask for experts to be put where they should lie; Status tells when they are."""
        if not self._death.done():
            self._send(Rearrange())

    def introduce(self, ports: list[int]) -> None:
        """Tell the core where all cores of this server listen for those of other servers."""
        if not self._death.done():
            self._send(Siblings(ports))

    def health(self) -> str | None:
        """None while the engine makes progress or has nothing to do, else what is wrong."""
        if self._death.done():
            return str(self._death.result())
        if self.silence_s() > _SILENCE_LIMIT_S:
            return f"the engine core has been silent for {self.silence_s():.0f} s"
        if self._status is not None and self._status.stalled_s > self._stall_limit_s:
            return f"the ranks have made no progress for {self._status.stalled_s:.0f} s"
        return None

    def silence_s(self) -> float:
        """Seconds since the core said anything; it reports every second."""
        return time.monotonic() - self._heard_s

    def give_up(self, reason: str) -> None:
        """Count the engine as dead although its process is there."""
        self._die(EngineDeadError(f"{self._engine.child.name} (pid {self._engine.child.process.pid}) {reason}"))

    async def died(self) -> EngineError:
        """Waits for the engine's death and says what it was."""
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        """Stop the engine; requests that still run fail."""
        can_be_asked = self._serving and not self._death.done()
        self._die(EngineDeadError("the engine was stopped"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if can_be_asked:
            await self._channel.send(Shutdown())
        await self._engine.stop(asked=can_be_asked)
        self._channel.close()

    def _check_alive(self) -> None:
        if self._death.done():
            raise EngineUnavailable(f"the engine stopped: {self._death.result()}")

    def _send(self, command: Submit | Abort | Withdraw | Siblings | Rearrange) -> None:
        """What is said in one turn of the event loop goes together: prompts of one call share their first step."""
        self._unsent.append(command)
        if len(self._unsent) == 1:
            task = asyncio.create_task(self._send_unsent())
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)

    async def _send_unsent(self) -> None:
        commands, self._unsent = self._unsent, []
        await self._channel.send(*commands)

    async def _receive(self, ready: asyncio.Future[Ready], on_progress: Callable[[LoadProgress], None]) -> None:
        while True:
            event = await self._channel.receive()
            self._heard_s = time.monotonic()
            match event:
                case StepOutput(deltas):
                    self._hand_out(deltas)
                case Status():
                    self._status = event
                    self._on_status(event)
                case Withdrawn(request_ids):
                    self._take_back(request_ids)
                case LoadProgress():
                    on_progress(event)
                case Ready():
                    if not ready.done():
                        ready.set_result(event)
                case EngineFailed(kind, message):
                    error = getattr(errors, kind, EngineDeadError)(message)
                    self._die(error if isinstance(error, FastDeployError) else EngineDeadError(message))

    def _hand_out(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            inbox = self._inboxes.get(delta.request_id)
            if inbox is None:
                continue  # its reader has gone
            if delta.finish_reason is not None:
                del self._inboxes[delta.request_id]
            self.load.take(delta)
            inbox.put(delta)

    def _take_back(self, request_ids: list[str]) -> None:
        requests = []
        for request_id in request_ids:
            inbox, submit = self._inboxes.pop(request_id, None), self.load.drop(request_id)
            if inbox is not None and submit is not None:  # else its reader has gone meanwhile
                requests.append((submit, inbox))
        self._on_withdrawn(requests)

    async def _watch(self) -> None:
        await self._engine.ended()
        await asyncio.sleep(0.1)  # what it said at last may still be on its way
        self._engine.child.process.poll()
        self._die(EngineDeadError(self._engine.child.describe_death()))

    def _check_end(self, task: asyncio.Task[None]) -> None:
        """A task that failed is a bug here; it must not leave requests waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            self._die(EngineDeadError(f"front end: {task.get_name()}: {type(error).__name__}: {error}"))

    def _die(self, error: FastDeployError) -> None:
        if self._death.done():
            return
        # Errors of the configuration or the checkpoint reach the user as they are.
        self._death.set_result(error)  # type: ignore[arg-type]
        for inbox in self._inboxes.values():
            inbox.fail(error)
        self._inboxes.clear()
        self.load = RankLoad()
