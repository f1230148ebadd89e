"""Log-probabilities in OpenAI's two formats: records with bytes for chat, parallel lists for plain completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdeploy.entrypoints.openai.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from fastdeploy.wire.messages import TokenLogprobs

if TYPE_CHECKING:
    from fastdeploy.frontend.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity; OpenAI writes this for a token that cannot come


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, n_top: int) -> ChatLogprobs:
    """One record per token, each with the `n_top` most likely tokens."""
    return ChatLogprobs([_chat_entry(entry, tokenizer, n_top) for entry in entries])


def _chat_entry(entry: TokenLogprobs, tokenizer: Tokenizer, n_top: int) -> ChatLogprob:
    top = [
        TopLogprob(tokenizer.token_text(token_id), max(logprob, LOWEST), list(tokenizer.token_bytes(token_id)))
        for token_id, logprob in zip(entry.top_ids[:n_top], entry.top_logprobs[:n_top], strict=True)
    ]
    taken = entry.token_id
    return ChatLogprob(
        tokenizer.token_text(taken), max(entry.logprob, LOWEST), list(tokenizer.token_bytes(taken)), top_logprobs=top
    )


class CompletionLogprobsWriter:
    """Writes the parallel lists of one choice piece by piece; keeps the text offset between pieces.

    A token's offset is the position of the character in which it begins, so the tokens that share one multi-byte
    character share its offset, and a token that is not shown takes no room.
    """

    def __init__(self, tokenizer: Tokenizer, n_top: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._n_top = n_top
        self._text = tokenizer.text_stream(skip_special_tokens)
        self._n_chars = 0

    def write(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], into: CompletionLogprobs | None = None
    ) -> CompletionLogprobs:
        """Appends `token_ids` with their entries (None: no log-probability, as for a prompt's first token)."""
        out = into or CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            out.tokens.append(self._tokenizer.token_text(token_id))
            out.text_offset.append(self._n_chars)
            self._n_chars += len(self._text.feed([token_id]))
            out.token_logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
            if out.top_logprobs is not None:
                out.top_logprobs.append(None if entry is None else self._top(entry))
        return out

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the one taken."""
        top: dict[str, float] = {}
        n_top = self._n_top
        for token_id, logprob in zip(entry.top_ids[:n_top], entry.top_logprobs[:n_top], strict=True):
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, LOWEST))
        top.setdefault(self._tokenizer.token_text(entry.token_id), max(entry.logprob, LOWEST))
        return top
