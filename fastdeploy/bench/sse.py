"""Reads a stream of completion chunks (server-sent events) and notes when tokens came.

This runs once per token of every stream, so it does little: one split, one typed decode, one append.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

END_MARK = b"[DONE]"
MAX_SHOWN = 500  # characters of a server's message


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_token(self) -> bool:
        """Whether a token came: text, or a step of a plain completion whose text is held back."""
        if self.text is not None:
            return bool(self.text) or self.finish_reason is None
        delta = self.delta
        return delta is not None and bool(delta.content or delta.reasoning_content or delta.reasoning)


class _Cached(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class EventReader:
    """One stream. `problem` is (kind, text) of what went wrong, None as long as nothing did."""

    __slots__ = (
        "_decode",
        "_rest",
        "done",
        "events_s",
        "finish_reason",
        "finish_s",
        "n_cached_tokens",
        "n_input",
        "n_output",
        "problem",
    )

    def __init__(self, decoder: msgspec.json.Decoder[_Chunk]) -> None:
        self._decode = decoder.decode
        self._rest = b""
        self.done = False
        self.events_s: array[float] = array("d")
        self.finish_reason: str | None = None
        self.finish_s = 0.0
        self.n_input: int | None = None  # as the server counts, None when it did not tell
        self.n_output: int | None = None
        self.n_cached_tokens: int | None = None
        self.problem: tuple[str, str] | None = None

    def feed(self, data: bytes, read_s: float) -> None:
        """Some bytes of the stream that were read at `read_s`; never raises."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            text = event[6:] if event.startswith(b"data: ") and b"\n" not in event else _data_of(event)
            if text == END_MARK:
                self.done = True
            elif text:
                self._take(text, read_s)

    def _take(self, text: bytes, read_s: float) -> None:
        try:
            chunk = self._decode(text)
        except msgspec.DecodeError as exc:
            self.problem = ("bad_event", f"{exc}: {text[:MAX_SHOWN].decode(errors='replace')}")
            return
        for choice in chunk.choices:
            if choice.has_token:
                self.events_s.append(read_s)
            if choice.finish_reason is not None:
                self.finish_reason, self.finish_s = choice.finish_reason, read_s
        usage = chunk.usage
        if usage is not None:
            self.n_input, self.n_output = usage.prompt_tokens, usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.n_cached_tokens = usage.prompt_tokens_details.cached_tokens
        if chunk.error is not None:
            self.problem = ("error_event", message_of(chunk.error))


def chunk_decoder() -> msgspec.json.Decoder[_Chunk]:
    """What all readers of a run share."""
    return msgspec.json.Decoder(_Chunk)


def message_of(error: object) -> str:
    """The text of an error as OpenAI's API gives it, shortened."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return str(error)[:MAX_SHOWN]


def _data_of(event: bytes) -> bytes:
    """The data of an event in any of the forms that the format allows; empty for a comment."""
    lines = (line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(lines)
