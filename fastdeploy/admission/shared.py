"""A waiting room that several servers share through Redis: the part that does not depend on who places requests.

The accepting half (`Accepted`) answers clients, the executing half (`Executions`) runs what others placed here. Between
them lies a `Placement`: `SplitwisePlacement` pushes requests to the least loaded node, `WorkStealing` lets idle nodes
take them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

import msgspec
from redis.exceptions import RedisError

from fastdeploy.admission.accepted import Accepted, Entry
from fastdeploy.admission.base import Engines
from fastdeploy.admission.executions import Executions
from fastdeploy.admission.link import RedisLink
from fastdeploy.admission.mail import Writers
from fastdeploy.admission.messages import Cancel, Result, decode_letter, decode_results, encode_json
from fastdeploy.admission.metrics import AdmissionMetrics
from fastdeploy.config.admission import AdmissionConfig
from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import EngineDeadError, EngineError, EngineUnavailable
from fastdeploy.frontend.client import Sink
from fastdeploy.wire.messages import Submit

_FAREWELL_S = 1.0

log = logging.getLogger("fastdeploy.scheduler")


class Placement(Protocol):
    """Finds a node for each entry, and keeps the loops that this takes.

    `patience_s`: without Redis for so long, requests on other servers are placed again.
    """

    patience_s: float

    def place(self, entry: Entry) -> None:
        """An entry needs a node."""

    def letters_to(self, node: str) -> str:
        """The list to which cancellations for a node are written."""

    def group_of(self, request_id: str) -> str:
        """The list that the results of a request come to."""

    def origin_of(self, group: str) -> str:
        """The node that reads a list of results."""

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """To be run while the room is open."""

    async def leave(self) -> None:
        """Take this server's nodes out of Redis."""


class SharedRoom:
    """The waiting room of one server of several; to be opened before it is used."""

    def __init__(
        self,
        config: AdmissionConfig,
        engine: EngineConfig,
        link: RedisLink,
        engines: Engines,
        metrics: AdmissionMetrics,
    ) -> None:
        self.config = config
        self.link = link
        self.engines = engines
        self.metrics = metrics
        self.writers = Writers(link, config)
        self.accepted = Accepted(self._place, self._cancel, self._refuse)
        self.executions = Executions(engines, self.writers, config, link.now_s)
        self.fingerprint = fingerprint(engine)
        self.placement: Placement
        self._tasks: list[asyncio.Future[None]] = []
        self._broken: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()
        self._closing = False

    def open(self, placement: Placement) -> None:
        """Start the loops; the engines serve."""
        self.placement = placement
        loops = [*placement.loops(), *self.writers.loops(), self._expire()]
        self._tasks = [asyncio.ensure_future(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self._check_end)

    def submit(self, requests: Iterable[Submit], inbox: Sink) -> None:
        """Take requests; see `WaitingRoom`."""
        if self._closing:
            raise EngineUnavailable("the server stops")
        for request in requests:
            self.accepted.add(request, inbox)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests that still run, wherever they are; what they have is their answer."""
        self.accepted.end(request_ids, tell=True)

    def forget(self, request_ids: Iterable[str]) -> None:
        """End requests that nobody reads any more."""
        self.accepted.end(request_ids, tell=False)

    def health(self) -> str | None:
        """That of the engines here. Without Redis a server still answers what its own engines can do alone."""
        wrong = self.engines.health()
        if wrong is None and self.link.down_s and self.config.role != "mixed":
            return f"a {self.config.role} server needs Redis: {self.link.state}"
        return wrong

    def note(self) -> dict[str, str]:
        """What /health tells besides."""
        return {"scheduler": self.config.name, "redis": self.link.state}

    async def died(self) -> EngineError:
        """Waits until the engine is gone for good, or a loop of this room failed."""
        waits = [asyncio.ensure_future(self.engines.died()), asyncio.ensure_future(asyncio.shield(self._broken))]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """Leave the others: what runs here for them is placed again by who accepted it; own requests fail."""
        self._closing = True
        for execution in list(self.executions.alive.values()):
            self.executions.end(execution, "the server that ran it stops")
        for entry in list(self.accepted.entries.values()):
            self._cancel(entry)
            self.accepted.fail(entry, EngineUnavailable("the server stops"))
        if self._tasks and not self.link.down_s:
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await self.placement.leave()
                    await self.writers.flush(_FAREWELL_S)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("left without telling Redis: %s", error)
        await self.stop()

    async def stop(self) -> None:
        """End the loops. A cancellation that meets an answer of Redis can be swallowed, so it is repeated."""
        pending = {task for task in self._tasks if not task.done()}
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)

    # ---- for placements ------------------------------------------------------------------------------------------

    def run_here(self, entry: Entry, data_rank: int | None) -> bool:
        """Give an entry to an engine of this server; False when it takes none."""
        request = entry.request
        suffix = f"#{entry.attempt}" if entry.attempt else ""
        submit = msgspec.structs.replace(
            request, request_id=request.request_id + suffix, output_ids=list(entry.output_ids), data_rank=data_rank
        )
        entry.local, entry.nodes = True, ("here",)
        try:
            self.engines.submit([submit], self.accepted.sink(entry))
        except EngineUnavailable:
            entry.local, entry.nodes = False, ()
            return False
        self.metrics.placed["own"] += 1
        return True

    def take_results(self, letter: bytes) -> None:
        """A letter with results of other servers."""
        try:
            results = decode_results(letter)
        except msgspec.MsgspecError as error:
            log.error("a letter with results cannot be read: %s", error)
            return
        for result in results:
            self.accepted.take(result)

    def take_request(self, letter: bytes, node: str, data_rank: int | None) -> None:
        """A letter with a request for this server, or with a cancellation."""
        try:
            content = decode_letter(letter)
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("a letter with a request cannot be read: %s", error)
            return
        self.executions.take(content, node, data_rank)

    def lose_nodes(self, nodes: set[str]) -> None:
        """Nodes are gone: their requests are placed again, and what runs here for them ends."""
        for entry in self.accepted.on_nodes(nodes):
            self.accepted.lose(entry, f"node {entry.nodes[0]} is gone")
        for execution in list(self.executions.alive.values()):
            if self.placement.origin_of(execution.group) in nodes:
                self.executions.end(execution, "its server was silent for too long")

    def lose_remote(self, reason: str) -> None:
        """All requests on other servers are placed again."""
        for entry in self.accepted.remote():
            self.accepted.lose(entry, reason)

    def _place(self, entry: Entry) -> None:
        if not self._closing:
            self.placement.place(entry)

    def _cancel(self, entry: Entry) -> None:
        request_id = entry.request.request_id
        if entry.local:
            suffix = f"#{entry.attempt}" if entry.attempt else ""
            self.engines.forget([request_id + suffix])
            return
        letter = encode_json(Cancel(request_id, entry.attempt, self.placement.group_of(request_id)))
        for node in entry.nodes:
            self.writers.send(request_id, self.placement.letters_to(node), letter)

    def _refuse(self, result: Result) -> None:
        """A server has taken an attempt that is void: it may stop."""
        entry = Cancel(result.request_id, result.attempt, self.placement.group_of(result.request_id))
        self.writers.send(result.request_id, self.placement.letters_to(result.node), encode_json(entry))

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.accepted.expire(time.time(), self.config.ttl_s)
            if self.link.down_s > self.placement.patience_s:  # not where Redis is asked, which waits for its answers
                self.lose_remote(f"Redis has been {self.link.state}")
            metrics = self.metrics
            metrics.n_alive = len(self.accepted.entries)
            metrics.n_queued = sum(not entry.nodes for entry in self.accepted.entries.values())
            metrics.n_for_others = len(self.executions.alive)
            metrics.placed_again = self.accepted.n_placed_again
            metrics.redis_up = not self.link.down_s

    def _check_end(self, task: asyncio.Future[None]) -> None:
        """A loop that failed is a bug here; it must not leave requests waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None and not self._broken.done():
            log.error("a loop of the scheduler failed", exc_info=error)
            self._broken.set_result(EngineDeadError(f"scheduler: {type(error).__name__}: {error}"))


def fingerprint(engine: EngineConfig) -> str:
    """Equal on servers whose answers to a request are equal, wherever their model lies."""
    model = engine.model
    known = msgspec.json.encode([model.shape, model.eos_token_ids, model.max_model_len, model.served_name])
    return hashlib.sha256(known).hexdigest()[:16]
