"""Several deltas of one choice, collected into one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastdeploy.wire.messages import RequestTimes, TokenLogprobs

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import ChoiceDelta


class Gathered:
    """Grows by `add`; costs what the deltas hold, however many they are."""

    __slots__ = ("_last", "_logprobs", "_n_cached", "_prompt_logprobs", "_texts", "_times", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._n_cached = 0
        self._times: RequestTimes | None = None
        self._last: ChoiceDelta | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Appends what `delta` brings."""
        self._last = delta
        self._texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self._n_cached = max(self._n_cached, delta.n_cached_tokens)
        self._times = delta.times or self._times

    @property
    def finished(self) -> bool:
        """True once a delta with a finish reason came."""
        return self._last is not None and self._last.finish_reason is not None

    def merged(self) -> ChoiceDelta:
        """All of it as one delta. Raises `ValueError` when nothing was added."""
        if self._last is None:
            raise ValueError("no delta was added")
        return replace(
            self._last,
            text="".join(self._texts),
            token_ids=self.token_ids,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            n_cached_tokens=self._n_cached,
            times=self._times,
        )
