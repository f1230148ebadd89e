"""Bytes of tokens to text: of a whole sequence, and of an answer while it grows.

Owns what is held back: bytes of an unfinished character (`TextStream`), and characters that may begin a stop string
(`IncrementalDetokenizer`).
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from fastdeploy.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastdeploy.frontend.tokenizer import Tokenizer

MARK_PER_BYTE = "fastdeploy.mark_per_byte"
"""Error handler for UTF-8: one U+FFFD for each byte that is none, as sentencepiece does ("replace" sets fewer)."""


def _mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(MARK_PER_BYTE, _mark_per_byte)


class TextRule(msgspec.Struct, frozen=True):
    """How the bytes of tokens become the text of a sequence.

    `n_lead_spaces` spaces are dropped where the sequence begins, and again behind each token of `lead_after` that is
    shown. A token of `lead_ends` keeps its spaces. `utf8_errors` names the handler for bytes that are no UTF-8.
    """

    utf8_errors: str = "replace"
    n_lead_spaces: int = 0
    lead_after: frozenset[int] = frozenset()
    lead_ends: frozenset[int] = frozenset()


class ByteTable(dict[int, bytes]):
    """Bytes of each token, worked out when first asked for; ids outside the vocabulary have none."""

    def __init__(self, vocab_size: int, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._vocab_size:
            return b""
        data = self[token_id] = self._compute(token_id)
        return data


class TextStream:
    """Text of one growing token sequence: `feed` never ends inside a character, `finish` gives what is left.

    All texts joined are the text of the whole sequence, however it was cut.
    """

    __slots__ = ("_bytes_of", "_n_lead", "_rule", "_utf8")

    def __init__(self, table: Mapping[int, bytes], rule: TextRule) -> None:
        self._bytes_of = table.__getitem__
        self._rule = rule
        self._n_lead = rule.n_lead_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(rule.utf8_errors)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete; up to 3 bytes are kept for later."""
        plain = self._n_lead == 0 and not self._rule.lead_after
        data = b"".join(map(self._bytes_of, token_ids)) if plain else self._without_lead(token_ids)
        return self._utf8.decode(data)

    def finish(self) -> str:
        """U+FFFD for a character that was begun and never completed, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _without_lead(self, token_ids: Sequence[int]) -> bytes:
        parts = []
        rule = self._rule
        for token_id in token_ids:
            data = self._bytes_of(token_id)
            if not data:
                continue
            if token_id in rule.lead_after:
                self._n_lead = rule.n_lead_spaces
            elif token_id in rule.lead_ends:
                self._n_lead = 0
            elif self._n_lead:
                n_dropped = min(self._n_lead, len(data) - len(data.lstrip(b" ")))
                data = data[n_dropped:]
                self._n_lead = 0 if data else self._n_lead - n_dropped
            parts.append(data)
        return b"".join(parts)


class TextStep(msgspec.Struct, frozen=True, gc=False):
    """What one push brought.

    `text` may be sent now. `n_tokens` of the pushed tokens belong to the answer: all, or those up to and with the one
    that completes the stop string `stop`.
    """

    text: str
    n_tokens: int
    stop: str | None = None


class StopAutomaton:
    """Finds the first of several strings in a text that comes character by character (Aho and Corasick, 1975).

    A state stands for the longest end of the text that begins a stop string: `depth[state]` characters. `hit[state]` is
    the longest stop string that ends there, or None. Memory and build time grow with the total length of the strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.depth = [0]
        self.hit: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        for stop in stops:
            self._insert(stop)
        self._fail = [0] * len(self.depth)
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self.depth)
                self.depth.append(self.depth[state] + 1)
                self.hit.append(None)
                self._next.append({})
            state = self._next[state][char]
        self.hit[state] = stop

    def _link(self) -> None:
        """Shorter states first: where to go on when no stop string goes on with the next character."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                self.hit[child] = self.hit[child] or self.hit[self._fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state behind `char`."""
        while True:
            following = self._next[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fail[state]

    def unfinished(self, state: int) -> int:
        """`state`, or, where its text is a whole stop string that none continues, the longest end one does."""
        while state and not self._next[state]:
            state = self._fail[state]
        return state


class IncrementalDetokenizer:
    """Text of one answer. Without a stop, all texts joined equal `tokenizer.decode` of all ids, however they were cut.

    The stop string that is complete first counts (of several ending at one character the longest), unless its last
    token comes before token number `min_tokens`. Special tokens that are skipped are not looked at.
    """

    __slots__ = ("_held", "_include_stop", "_min_tokens", "_n_tokens", "_state", "_stops", "_stream", "stopped_by")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stream = tokenizer.text_stream(params.skip_special_tokens)
        stops = params.stop_strings
        self._stops = StopAutomaton(stops) if stops else None
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._n_tokens = 0
        self._state = 0
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_ids: Sequence[int]) -> TextStep:
        """Takes the next tokens. After a stop string was hit, further tokens are ignored (`n_tokens` is 0)."""
        if self._stops is None:
            return TextStep(self._stream.feed(token_ids), len(token_ids))
        if self.stopped_by is not None:
            return TextStep("", 0, self.stopped_by)
        sent = []
        for n_before, token_id in enumerate(token_ids):
            self._n_tokens += 1
            text = self._stream.feed((token_id,))
            if text:
                safe, self.stopped_by = self._release(self._stops, text)
                sent.append(safe)
                if self.stopped_by is not None:
                    return TextStep("".join(sent), n_before + 1, self.stopped_by)
        return TextStep("".join(sent), len(token_ids))

    def finish(self) -> str:
        """What was held back, when no more tokens come; empty after a stop string."""
        if self.stopped_by is not None:
            return ""
        held, self._held = self._held, ""
        return held + self._stream.finish()

    def _release(self, stops: StopAutomaton, text: str) -> tuple[str, str | None]:
        """The part of held and new text that no stop string can reach any more, and the stop string hit."""
        window = self._held + text
        state = self._state
        for end, char in enumerate(text, len(self._held) + 1):
            state = stops.step(state, char)
            hit = stops.hit[state]
            if hit is not None and self._n_tokens >= self._min_tokens:
                return window[: end if self._include_stop else end - len(hit)], hit
        self._state = state = stops.unfinished(state)
        n_sent = len(window) - stops.depth[state]
        self._held = window[n_sent:]
        return window[:n_sent], None
