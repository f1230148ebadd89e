"""The bytes of a stream: server-sent events whose constant parts are encoded once.

A chunk costs the encoding of its text and a join; one call writes what one engine step brought.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from fastdeploy.entrypoints.openai.gathered import Gathered
from fastdeploy.entrypoints.openai.job import Job
from fastdeploy.entrypoints.openai.responses import ErrorBody, ErrorInfo

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import ChoiceDelta

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class ChunkForm:
    """How a chunk of one kind looks around its text."""

    object: str
    before_text: bytes  # follows `"index":0`
    after_text: bytes  # closes what `before_text` opened


class Answer(Protocol):
    """What differs between chat and plain completions. `choice` is the index of a choice in the whole request."""

    form: ChunkForm

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Fields that a choice's opening chunk has next to its index; None for no opening chunk."""

    def lead(self, choice: int) -> str:
        """Text that comes before the generated one."""

    def logprobs(self, choice: int, delta: ChoiceDelta) -> msgspec.Struct | None:
        """Log-probabilities of the tokens of `delta`."""

    def full(self, outputs: list[ChoiceDelta]) -> msgspec.Struct:
        """The whole answer; `outputs` holds one merged delta per choice."""


class EventWriter:
    """Writes the chunks of one stream."""

    def __init__(self, job: Job, answer: Answer) -> None:
        self._job = job
        self._answer = answer
        form = answer.form
        constant = {"id": job.request_id, "object": form.object, "created": int(job.created_s), "model": job.model}
        self._start = b"data: " + _encode(constant)[:-1] + b',"choices":['
        n = job.n_choices * len(job.prompts)
        self._heads = [b'%s{"index":%d%s' % (self._start, i, form.before_text) for i in range(n)]
        self._after_text = form.after_text
        self._plain = form.after_text + b',"logprobs":null,"finish_reason":null,"arrival_time":'
        self._opened = [False] * n
        self._held: dict[int, Gathered] = {}
        self._wants_logprobs = job.params[0].logprobs is not None or job.params[0].prompt_logprobs is not None
        self._is_plain = not (self._wants_logprobs or job.return_token_ids or job.continuous_usage)
        self._clock_zero_s = job.created_s

    def step(self, prompt_index: int, deltas: list[ChoiceDelta]) -> bytes:
        """The events of one engine step of one prompt; empty when there is nothing to show yet."""
        parts: list[bytes] = []
        arrival = b"%.6f" % (time.time() - self._clock_zero_s)
        base = prompt_index * self._job.n_choices
        for delta in deltas:
            choice = base + delta.index
            if not self._opened[choice]:
                delta = self._open(choice, delta, parts)
            if self._job.tokens_per_chunk > 1:
                gathered = self._gather(choice, delta)
                if gathered is None:
                    continue
                delta = gathered
            if self._is_plain and delta.finish_reason is None:
                if delta.text:
                    parts += (self._heads[choice], _encode(delta.text), self._plain, arrival, b"}]}\n\n")
            else:
                self._write(choice, delta, arrival, parts)
        return b"".join(parts)

    def closing(self) -> bytes:
        """The usage chunk, if asked for, and the end mark."""
        if not self._job.include_usage:
            return DONE
        return self._start + b'],"usage":' + _encode(self._job.usage()) + b"}\n\n" + DONE

    def _open(self, choice: int, delta: ChoiceDelta, parts: list[bytes]) -> ChoiceDelta:
        """Writes the opening chunk and starts the clock of `arrival_time`; returns `delta` with the leading text."""
        self._opened[choice] = True
        fields = self._answer.opening(choice)
        if fields is not None:
            entry = {"index": choice, **fields, "logprobs": None, "finish_reason": None}
            parts += (self._start, _encode(entry), b"]", self._usage(), b"}\n\n")
        if delta.times is not None and delta.times.first_scheduled_s:
            self._clock_zero_s = delta.times.first_scheduled_s
        lead = self._answer.lead(choice)
        return replace(delta, text=lead + delta.text) if lead else delta

    def _gather(self, choice: int, delta: ChoiceDelta) -> ChoiceDelta | None:
        """Collects deltas of a choice until they hold enough tokens, or are its last."""
        held = self._held.setdefault(choice, Gathered())
        held.add(delta)
        if delta.finish_reason is None and len(held.token_ids) < self._job.tokens_per_chunk:
            return None
        del self._held[choice]
        return held.merged()

    def _usage(self) -> bytes:
        return b',"usage":' + _encode(self._job.usage()) if self._job.continuous_usage else b""

    def _write(self, choice: int, delta: ChoiceDelta, arrival: bytes, parts: list[bytes]) -> None:
        """A chunk with more than text."""
        logprobs = self._answer.logprobs(choice, delta) if self._wants_logprobs else None
        if not (delta.text or delta.finish_reason or logprobs or (self._job.return_token_ids and delta.token_ids)):
            return
        parts += (self._heads[choice], _encode(delta.text))
        if self._job.return_token_ids:
            parts += (
                b',"completion_token_ids":',
                _encode(delta.token_ids),
                b',"completion_tokens":',
                _encode(delta.text),
            )
        parts += (
            self._after_text,
            b',"logprobs":',
            _encode(logprobs),
            b',"finish_reason":',
            _encode(delta.finish_reason),
        )
        if delta.stop_reason is not None:
            parts += (b',"stop_reason":', _encode(delta.stop_reason))
        parts += (b',"arrival_time":', arrival, b"}]", self._usage(), b"}\n\n")


def error_events(info: ErrorInfo) -> bytes:
    """The end of a stream that failed after it began."""
    return b"data: " + _encode(ErrorBody(info)) + b"\n\n" + DONE
