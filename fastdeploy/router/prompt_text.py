"""What a policy wants to know of a request's body: its text, its length, whether the answer is a stream."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_PARSED_BYTES = 4 * 1024 * 1024  # parsing a larger body would keep all streams waiting
BYTES_PER_TOKEN = 4  # of UTF-8, what tokenizers make of prose in most languages
TOKENS_PER_CHARACTER = 2  # the router's estimate for texts; token ids are counted


class _Message(msgspec.Struct, gc=False):
    content: Any = None


class _Body(msgspec.Struct, gc=False):
    messages: list[_Message | int] | None = None
    prompt: Any = None
    prompt_token_ids: Any = None
    stream: bool | None = None


class PromptFigures(msgspec.Struct, frozen=True, gc=False):
    """`n_tokens` is an estimate from above, for loads; `text` is empty when it was not wanted or is not text.

    `n_prompt_tokens` is the likely length of the prompt, 0 when it is not known or no text was wanted.
    """

    n_tokens: int
    text: str
    is_stream: bool
    n_prompt_tokens: int = 0


class PromptReader:
    """Reads bodies; `wants_text` when a policy compares prompts."""

    def __init__(self, wants_text: bool) -> None:
        self._wants_text = wants_text
        self._decode = msgspec.json.Decoder(_Body).decode

    def read(self, body: bytes) -> PromptFigures:
        """Never raises: for a body that cannot be read its size is the estimate, and the server tells what is wrong."""
        if len(body) > MAX_PARSED_BYTES:
            return PromptFigures(TOKENS_PER_CHARACTER * len(body), "", False)
        try:
            fields = self._decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return PromptFigures(TOKENS_PER_CHARACTER * len(body), "", False)
        n_ids = 0
        texts: list[str] = []
        for message in fields.messages or ():
            if isinstance(message, int):
                n_ids += 1
            else:
                _gather(message.content, texts)
        n_ids += _gather(fields.prompt, texts) + _gather(fields.prompt_token_ids, texts)
        n_tokens = TOKENS_PER_CHARACTER * (sum(map(len, texts)) + max(len(texts) - 1, 0)) + n_ids
        text = " ".join(texts) if self._wants_text else ""
        if self._wants_text and n_ids and not texts:
            text = _as_text(fields)
        n_likely = 0
        if self._wants_text:
            n_likely = n_ids + -(-sum(len(one.encode(errors="replace")) for one in texts) // BYTES_PER_TOKEN)
        return PromptFigures(n_tokens, text, fields.stream is True, n_likely)


def _gather(value: Any, texts: list[str]) -> int:
    """Adds the strings of a prompt, or the text parts of a content, to `texts`; returns the number of token ids."""
    if isinstance(value, str):
        texts.append(value.strip())
        return 0
    if not isinstance(value, list):
        return 0
    if value and isinstance(value[0], int):
        return len(value)
    n_ids = 0
    for part in value:
        if isinstance(part, list):
            n_ids += len(part)
        else:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                texts.append(text.strip())
    return n_ids


def _as_text(fields: _Body) -> str:
    """Token ids as a text with one character per token: equal beginnings stay equal."""
    ids = fields.prompt_token_ids or fields.prompt or fields.messages or ()
    flat = [one for part in ids for one in (part if isinstance(part, list) else (part,))]
    return "".join(chr(one % 0x110000) for one in flat if isinstance(one, int))
