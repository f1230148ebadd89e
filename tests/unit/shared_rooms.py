"""Several servers in one event loop: real waiting rooms over a real Redis, engines that make tokens by a rule."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from engine_sim import make_config
from prometheus_client import CollectorRegistry

from fastdeploy.admission.link import RedisLink
from fastdeploy.admission.metrics import AdmissionMetrics
from fastdeploy.admission.private_redis import PrivateRedis
from fastdeploy.admission.shared import SharedRoom
from fastdeploy.admission.splitwise import SplitwisePlacement
from fastdeploy.admission.stealing import WorkStealing
from fastdeploy.config.admission import AdmissionConfig
from fastdeploy.errors import EngineDeadError, EngineError, EngineUnavailable, FastDeployError
from fastdeploy.frontend.client import Sink
from fastdeploy.frontend.ledger import RankLoad
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Submit, TokenDelta

PATIENCE_S = 40.0


def token(prompt_ids: list[int], position: int) -> int:
    """The answer that every engine gives."""
    return (sum(prompt_ids) * 31 + position * 7) % 1000


class SimEngines:
    """One data-parallel rank that gives every request a token each `step_s`."""

    def __init__(self, step_s: float = 0.005, n_slots: int = 1_000) -> None:
        self.step_s = step_s
        self.load = RankLoad()
        self.serves = True
        self.ran: list[str] = []
        self.starts: list[Submit] = []
        self.frozen = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(n_slots)

    def submit(self, requests: Iterable[Submit], inbox: Sink) -> None:
        if not self.serves:
            raise EngineUnavailable("down")
        for request in requests:
            self.load.add(request)
            self.ran.append(request.request_id)
            self.starts.append(request)
            self._tasks[request.request_id] = asyncio.create_task(self._run(request, inbox))

    async def _run(self, request: Submit, inbox: Sink) -> None:
        n = len(request.output_ids)
        async with self._slots:
            while True:
                await asyncio.sleep(self.step_s)
                while self.frozen:
                    await asyncio.sleep(0.02)
                n += 1
                finish = "length" if n == request.params.max_tokens else None
                delta = TokenDelta(request.request_id, [token(request.prompt_ids, n - 1)], finish)
                self.load.take(delta)
                inbox.put(delta)
                if finish:
                    del self._tasks[request.request_id]
                    return

    def abort(self, request_ids: Iterable[str]) -> None:
        raise AssertionError("shared rooms forget")

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if (task := self._tasks.pop(request_id, None)) is not None:
                task.cancel()
                self.load.drop(request_id)

    def health(self) -> str | None:
        return None if self.serves else "down"

    def note(self) -> dict[str, str]:
        return {}

    def loads(self) -> dict[int, RankLoad]:
        return {0: self.load} if self.serves else {}

    async def died(self) -> EngineError:
        await asyncio.Event().wait()
        return EngineDeadError("never")


class Answer:
    """The sink of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.last: asyncio.Future[TokenDelta] = asyncio.get_running_loop().create_future()
        self.began = asyncio.Event()

    def put(self, delta: TokenDelta) -> None:
        assert not self.last.done(), "a delta after the end"
        self.token_ids += delta.token_ids
        if delta.token_ids:
            self.began.set()
        if delta.finish_reason is not None:
            self.last.set_result(delta)

    def fail(self, error: FastDeployError) -> None:
        raise AssertionError("rooms answer with deltas")


class SimServer:
    """One server."""

    def __init__(self, room: SharedRoom, engines: SimEngines) -> None:
        self.room = room
        self.engines = engines

    def ask(self, request_id: str, n_prompt: int = 10, n_tokens: int = 8, arrival_s: float | None = None) -> Answer:
        answer = Answer()
        params = SamplingParams(max_tokens=n_tokens, seed=1)
        self.room.submit(
            [Submit(request_id, list(range(n_prompt)), params, time.time() if arrival_s is None else arrival_s)], answer
        )
        return answer

    async def kill(self) -> None:
        """As kill -9 looks to the others: no word any more, nothing runs."""
        await self.room.stop()
        self.engines.forget(list(self.engines._tasks))
        self.room._closing = True


@asynccontextmanager
async def server(
    redis: PrivateRedis,
    engines: SimEngines | None = None,
    disaggregated: Mapping[int, dict[str, Any]] | None = None,
    **settings: Any,
) -> AsyncIterator[SimServer]:
    """A server of the topic "test"; `settings` are fields of AdmissionConfig."""

    engines = engines or SimEngines()
    config = replace(
        AdmissionConfig(
            name="splitwise",
            host=redis.host,
            port=redis.port,
            password=redis.password,
            topic="test",
            expire_period_s=1.0,
        ),
        **settings,
    )
    metrics = AdmissionMetrics(CollectorRegistry())
    link = RedisLink(config, metrics)
    await link.open()
    room = SharedRoom(config, make_config(), link, engines, metrics)
    if config.name == "splitwise":
        room.open(SplitwisePlacement(room, (0,), "host", disaggregated or {}))
    else:
        room.open(WorkStealing(room, 2))
    try:
        yield SimServer(room, engines)
    finally:
        await room.close()
        await link.close()
