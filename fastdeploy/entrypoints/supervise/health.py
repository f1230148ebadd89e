"""Whether a server is alive, judged by its answers to GET /health."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import dataclass
from urllib.parse import urlsplit

POLL_S = 2.0
POLL_STARTING_S = 0.5
TIMEOUT_S = 3.0
SILENCE_S = 7.0
START_SILENCE_S = 120.0  # until it is ready
DRAIN_SILENCE_S = 20.0  # a server on its way down stops answering some time before its end
UNWELL_S = 120.0  # a server replaces a dead engine by itself; so long it has to do so
MAX_ANSWER_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP status, and the reason in the body when it is not 200."""

    status: int
    reason: str = ""


async def ask(url: str, timeout_s: float = TIMEOUT_S) -> Answer | None:
    """The answer of the server at `url`, None when none comes in time."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(f"GET /health HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                return _parse(await reader.read(MAX_ANSWER_BYTES))
            finally:
                writer.close()
    except OSError:  # TimeoutError is one
        return None


def _parse(data: bytes) -> Answer | None:
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    if len(words) < 2 or not words[1].isdigit():
        return None
    reason = ""
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a body in another shape tells no reason
        reason = str(json.loads(body)["error"]["message"])
    return Answer(int(words[1]), reason)


class HealthWatch:
    """What the answers of a server mean in one phase of its life, which begins at `now_s` of a monotonic clock.

    It is to be killed when it is silent for `silence_s` and two polls in a row, or unwell for `unwell_s`.
    """

    def __init__(self, now_s: float, silence_s: float, unwell_s: float = math.inf) -> None:
        self._silence_s = silence_s
        self._unwell_s = unwell_s
        self._heard_s = now_s
        self._n_silent = 0
        self._unwell_since_s: float | None = None

    def verdict(self, answer: Answer | None, now_s: float) -> str | None:
        """Take in an answer, or that there was none; why the server is to be killed, or None."""
        if answer is None:
            self._n_silent += 1
            silent_s = now_s - self._heard_s
            too_long = self._n_silent >= 2 and silent_s >= self._silence_s
            return f"did not answer GET /health for {silent_s:.0f} s" if too_long else None
        self._heard_s, self._n_silent = now_s, 0
        if answer.status == 200:
            self._unwell_since_s = None
            return None
        if self._unwell_since_s is None:
            self._unwell_since_s = now_s
        unwell_s = now_s - self._unwell_since_s
        if unwell_s < self._unwell_s:
            return None
        return f"answered GET /health with {answer.status} for {unwell_s:.0f} s ({answer.reason})"
