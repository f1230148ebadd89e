"""The requests that this server runs for others: from a letter to the engine, and from the engine to a letter."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from fastdeploy.admission.base import Engines
from fastdeploy.admission.mail import Writers
from fastdeploy.admission.messages import Cancel, Place, Result, attempt_id
from fastdeploy.admission.pairs import pairing_of
from fastdeploy.config.admission import AdmissionConfig
from fastdeploy.errors import EngineUnavailable, FastDeployError, RequestError, RequestTimeout
from fastdeploy.wire.messages import Submit, TokenDelta

_N_REMEMBERED = 20_000  # attempts that have ended, so that a repeated letter does not run them again

log = logging.getLogger("fastdeploy.scheduler")


class Executions:
    """All of them. A letter may come twice and a cancellation may come first; each attempt runs at most once."""

    def __init__(self, engines: Engines, writers: Writers, config: AdmissionConfig, clock: Callable[[], float]) -> None:
        """`clock`: seconds as Redis counts them."""
        self.alive: dict[str, _Execution] = {}
        self._engines = engines
        self._writers = writers
        self._clock = clock
        self._ttl_s = config.ttl_s
        self._role = config.role
        self._seen: OrderedDict[str, None] = OrderedDict()

    def take(self, letter: Place | Cancel, node: str, data_rank: int | None) -> None:
        """Start what a letter asks for on `data_rank`, or on any rank, or stop it."""
        engine_id = attempt_id(letter.request_id, letter.attempt, letter.group)
        if isinstance(letter, Cancel):
            self._remember(engine_id)
            if self.alive.pop(engine_id, None) is not None:
                self._engines.forget([engine_id])
            return
        if engine_id in self._seen:
            return
        self._remember(engine_id)
        execution = _Execution(self, letter, engine_id, node, data_rank)
        self.alive[engine_id] = execution
        execution.say(None)
        if time.time() - letter.arrival_time > self._ttl_s:
            execution.refuse(RequestTimeout(f"older than {self._ttl_s:.0f} s (--scheduler-ttl)"))
            return
        submit = Submit(
            engine_id,
            letter.prompt_token_ids,
            letter.sampling_params,
            letter.arrival_time,
            pairing=pairing_of(letter.disaggregate_info, self._role),
            output_ids=letter.output_token_ids,
            data_rank=data_rank,
        )
        try:
            self._engines.submit([submit], execution)
        except RequestError as error:
            execution.refuse(error)

    def end(self, execution: _Execution, reason: str) -> None:
        """Stop an attempt and tell who accepted the request, which places it again if it is still there."""
        if self.alive.get(execution.engine_id) is execution:
            self._engines.forget([execution.engine_id])
            execution.refuse(EngineUnavailable(reason))

    def silent(self, silent_s: float) -> dict[int | None, tuple[int, int]]:
        """Prompt tokens and requests of each rank that said nothing for so long: no load any more."""
        found: dict[int | None, tuple[int, int]] = {}
        oldest_s = time.monotonic() - silent_s
        for execution in self.alive.values():
            if execution.heard_s < oldest_s:
                tokens, requests = found.get(execution.data_rank, (0, 0))
                found[execution.data_rank] = (tokens + execution.n_prompt, requests + 1)
        return found

    def send(self, execution: _Execution, delta: TokenDelta | None) -> None:
        """Write a result. Nothing comes from a prefill node: decode answers, also when prefill failed."""
        if delta is not None and delta.finish_reason is not None:
            self.alive.pop(execution.engine_id, None)
        if self._role == "prefill":
            return
        taken_s = self._clock() if delta is None else 0.0
        result = Result(execution.request_id, execution.attempt, execution.n_sent, execution.node, delta, taken_s)
        execution.n_sent += 1
        self._writers.send(execution.request_id, execution.group, result)

    def _remember(self, engine_id: str) -> None:
        self._seen[engine_id] = None
        if len(self._seen) > _N_REMEMBERED:
            self._seen.popitem(last=False)


class _Execution:
    """One attempt that runs here; the engine's sink."""

    def __init__(self, table: Executions, place: Place, engine_id: str, node: str, data_rank: int | None) -> None:
        self.engine_id = engine_id
        self.request_id = place.request_id
        self.attempt = place.attempt
        self.group = place.group
        self.node = node
        self.data_rank = data_rank
        self.n_prompt = len(place.prompt_token_ids)
        self.n_sent = 0
        self.heard_s = time.monotonic()
        self._table = table

    def say(self, delta: TokenDelta | None) -> None:
        """Report; None says that it was taken."""
        self._table.send(self, delta)

    def refuse(self, error: RequestError) -> None:
        """End with an error."""
        kind = type(error).__name__
        self.say(TokenDelta(self.request_id, [], "error", error=error.message, error_kind=kind))

    def put(self, delta: TokenDelta) -> None:
        """From the engine."""
        self.heard_s = time.monotonic()
        if self._table.alive.get(self.engine_id) is self:
            self.say(delta)

    def fail(self, error: FastDeployError) -> None:
        """The engine is gone."""
        if self._table.alive.get(self.engine_id) is self:
            self.refuse(EngineUnavailable(str(error)))
