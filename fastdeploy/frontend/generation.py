"""From prompt ids to growing text: what HTTP handlers and `LLM` call.

Owns the n answers of one request: their engine requests, detokenising, stop strings, and the metrics of all that.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from fastdeploy import errors
from fastdeploy.admission.base import WaitingRoom
from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import ContextTooLong, EngineError, EngineUnavailable, InvalidRequest, RequestError
from fastdeploy.frontend.client import Inbox
from fastdeploy.frontend.detokenizer import IncrementalDetokenizer
from fastdeploy.frontend.experts import ExpertDesk
from fastdeploy.frontend.params import checked_params
from fastdeploy.frontend.tokenizer import Tokenizer
from fastdeploy.observability.metrics import Metrics
from fastdeploy.sampling_params import MAX_SEED, SamplingParams
from fastdeploy.wire.messages import FinishReason, Pairing, Ready, RequestTimes, Submit, TokenDelta, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step added to one of a request's answers; `text` is safe to show, and may be empty."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None  # the stop token id or stop string that ended it
    prompt_logprobs: list[TokenLogprobs | None] | None
    n_cached_tokens: int
    times: RequestTimes | None
    error: str | None


class Generator:
    """All requests of one front end."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        metrics: Metrics,
        engine: WaitingRoom,
        ready: Ready,
        dp_ranks: tuple[int, ...] = (),
        experts: ExpertDesk | None = None,
    ) -> None:
        """`dp_ranks`: data-parallel ranks that a request may name; none unless --scheduler-name is dp."""
        self.experts = experts  # with --enable-eplb
        self.config = config
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.ready = ready
        self._engine = engine
        self._dp_ranks = dp_ranks
        self._alive: dict[str, list[str]] = {}  # request id -> engine ids of its answers

    def check(self, prompt_ids: list[int], params: SamplingParams) -> SamplingParams:
        """`params` without unset numbers, fit for this prompt and model. Raises RequestError."""
        model, limit = self.config.model, self.config.model.max_model_len
        n_prompt = len(prompt_ids)
        if n_prompt == 0:
            raise InvalidRequest("prompt must have at least one token", "prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= model.shape.vocab_size:
            raise InvalidRequest(f"prompt: token ids must be in [0, {model.shape.vocab_size - 1}]", "prompt")
        if n_prompt >= limit or n_prompt + params.min_tokens > limit:
            wanted = f" and min_tokens is {params.min_tokens}" if n_prompt < limit else ""
            raise ContextTooLong(f"the prompt has {n_prompt} tokens{wanted}; --max-model-len is {limit}", "prompt")
        params = checked_params(params, self.config, self.tokenizer)
        return params.resolved(model.sampling_defaults, limit - n_prompt)

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        pairing: Pairing | None = None,
        dp_rank: int | None = None,
        output_ids: Sequence[int] = (),
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        """The answers of one request, of `params` from `check`; each item is what came since the last.

        `pairing`, `output_ids`: see `Submit`; the answer begins with the latter. Closing the generator ends the
        request at once. Raises RequestError: what the engine refused, or EngineUnavailable.
        """
        if request_id in self._alive:
            raise InvalidRequest(f"request_id {request_id!r} is in use by a request that has not ended", "request_id")
        answers = {f"{request_id}_{i}": _Answer(i, self.tokenizer, params, output_ids) for i in range(params.n)}
        self._alive[request_id] = list(answers)
        inbox = Inbox()
        self.metrics.request_received()
        try:
            self._engine.submit(_submits(answers, prompt_ids, params, pairing, dp_rank, output_ids), inbox)
            for _ in answers:
                self.metrics.request_started()
            running = len(answers)
            while running:
                deltas = [answers[delta.request_id].take(delta) for delta in await inbox.take()]
                self._observe(answers.values())
                running = sum(not answer.ended for answer in answers.values())
                stopped = [engine_id for engine_id, answer in answers.items() if answer.stopped_here]
                if stopped:
                    self._engine.forget(stopped)
                yield [delta for delta in deltas if delta is not None]
        finally:
            del self._alive[request_id]
            self._engine.forget(answers)
            self._record(answers.values(), len(prompt_ids), params)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """End requests; returns the ids of those that were alive."""
        found = [request_id for request_id in request_ids if request_id in self._alive]
        for request_id in found:
            self._engine.abort(self._alive[request_id])
        return found

    def alive_requests(self) -> list[str]:
        """Ids of all requests that have not ended."""
        return list(self._alive)

    def check_dp_rank(self, dp_rank: int | None) -> None:
        """Raises InvalidRequest when a request may not name this data-parallel rank."""
        if dp_rank is None or dp_rank in self._dp_ranks:
            return
        if not self._dp_ranks:
            raise InvalidRequest("dp_rank needs a server with --scheduler-name dp", "dp_rank")
        raise InvalidRequest(f"dp_rank must be one of {list(self._dp_ranks)}, got {dp_rank}", "dp_rank")

    def note(self) -> dict[str, str]:
        """What /health tells besides; empty when there is nothing to tell."""
        return self._engine.note()

    def health(self) -> str | None:
        """None while the engine is well, else what is wrong."""
        return self._engine.health()

    async def died(self) -> EngineError:
        """Waits for the engine's death and says what it was."""
        return await self._engine.died()

    def _observe(self, answers: Iterable[_Answer]) -> None:
        for answer in answers:
            if answer.first_times is not None:
                self.metrics.first_token(answer.first_times)
                answer.first_times = None
            if answer.gap_tokens:
                self.metrics.token_gap(answer.gap_s / answer.gap_tokens, answer.gap_tokens)
                answer.gap_tokens = 0

    def _record(self, answers: Iterable[_Answer], n_prompt: int, params: SamplingParams) -> None:
        for answer in answers:
            self.metrics.request_finished(
                answer.times,
                n_prompt,
                answer.n_tokens,
                answer.n_cached_tokens,
                params.max_tokens or 0,
                answer.finish_reason or "abort",
            )


class _Answer:
    """One of the n answers of a request."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, params: SamplingParams, output_ids: Sequence[int] = ()
    ) -> None:
        """`output_ids` were generated before; they come with the first tokens."""
        self.index = index
        self._known = list(output_ids)
        self.ended = False
        self.stopped_here = False  # by a stop string, which the engine knows nothing of
        self.finish_reason: FinishReason | None = None
        self.n_tokens = 0
        self.n_cached_tokens = 0
        self.times: RequestTimes | None = None
        self.first_times: RequestTimes | None = None  # not yet seen by the metrics
        self.gap_s = 0.0
        self.gap_tokens = 0
        self._last_s = 0.0
        self._text = IncrementalDetokenizer(tokenizer, params)
        self._show_stop_token = params.include_stop_str_in_output
        self._custom_stops = frozenset(params.stop_token_ids or ())

    def take(self, delta: TokenDelta) -> ChoiceDelta | None:
        """The text of what the engine added; None when this answer has ended. Raises what the engine refused."""
        if self.ended:
            return None
        if delta.finish_reason == "error" and delta.error_kind is not None:
            self.ended, self.finish_reason = True, "error"
            raise _request_error(delta)
        self._note_times(delta)
        if self._known:
            delta = msgspec.structs.replace(delta, token_ids=self._known + delta.token_ids)
            self._known = []
        finish = delta.finish_reason
        stop_reason: int | str | None = self._stop_reason(delta)
        hidden = stop_reason is not None and not self._show_stop_token
        step = self._text.push(delta.token_ids[:-1] if hidden else delta.token_ids)
        text, token_ids, logprobs = step.text, delta.token_ids, delta.logprobs
        if step.stop is not None:
            self.stopped_here = finish is None
            finish, stop_reason = "stop", step.stop
            token_ids = token_ids[: step.n_tokens]
            logprobs = logprobs and logprobs[: step.n_tokens]
        elif finish is not None:
            text += self._text.finish()
        self.n_tokens += len(token_ids)
        self.ended, self.finish_reason = finish is not None, finish
        return ChoiceDelta(
            self.index,
            text,
            token_ids,
            logprobs,
            finish,
            stop_reason,
            delta.prompt_logprobs,
            delta.n_cached_tokens,
            delta.times,
            delta.error,
        )

    def _stop_reason(self, delta: TokenDelta) -> int | None:
        """The stop token of the request's own that ended it; the model's end of text is no reason worth telling."""
        return delta.stop_token_id if delta.stop_token_id in self._custom_stops else None

    def _note_times(self, delta: TokenDelta) -> None:
        now_s = time.monotonic()
        self.n_cached_tokens = delta.n_cached_tokens
        if self.n_tokens == 0 and delta.times is not None and delta.token_ids:
            self.first_times = delta.times
        elif delta.token_ids and self._last_s:
            self.gap_s = now_s - self._last_s
            self.gap_tokens = len(delta.token_ids)
        self._last_s = now_s
        self.times = delta.times or self.times


def _submits(
    answers: Iterable[str],
    prompt_ids: list[int],
    params: SamplingParams,
    pairing: Pairing | None,
    dp_rank: int | None,
    output_ids: Sequence[int],
) -> list[Submit]:
    """One engine request per answer; answer i draws with seed + i."""
    now_s, seed = time.time(), params.seed or 0
    return [
        Submit(
            engine_id,
            prompt_ids,
            msgspec.structs.replace(params, n=1, best_of=None, seed=(seed + i) % (MAX_SEED + 1)),
            now_s,
            pairing,
            output_ids=list(output_ids),
            data_rank=dp_rank,
        )
        for i, engine_id in enumerate(answers)
    ]


def _request_error(delta: TokenDelta) -> RequestError:
    kind = getattr(errors, delta.error_kind or "", EngineUnavailable)
    error: RequestError = kind(delta.error or "the engine ended the request")
    return error
