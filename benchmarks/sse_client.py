"""A cheap streaming client: raw asyncio sockets and httptools, one connection a request.

The machine's cores are shared with the server under test, so the client only notes when bytes came; what they say is
read after the run.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
from workload import Workload


@dataclass(slots=True)
class StreamTimes:
    """One streamed answer: when it was asked for, when each token event came, how many tokens it had."""

    start_s: float
    events_s: list[float] = field(default_factory=list)
    n_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Request sent until the first text."""
        return self.events_s[0] - self.start_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.events_s[-1] - self.events_s[0]) / max(self.n_tokens - 1, 1)


class _Body:
    """Collects the body of one response with arrival times; methods are httptools' callbacks."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def on_message_complete(self) -> None:
        self.complete = True


async def stream_completion(host: str, port: int, prompt: list[int], n_output: int) -> StreamTimes:
    """POST /v1/completions with stream; raises RuntimeError for anything but a whole answer of `n_output` tokens."""
    request = {
        "prompt": prompt,
        "max_tokens": n_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    times, body = StreamTimes(time.perf_counter()), _Body()
    parser = httptools.HttpResponseParser(body)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + payload)
        while not body.complete and (data := await reader.read(65536)):
            parser.feed_data(data)
    finally:
        writer.close()
    status = parser.get_status_code()
    if status != 200:
        raise RuntimeError(f"the server answered {status}: {b''.join(piece for _, piece in body.pieces)[:500]!r}")
    _read_events(times, body.pieces)
    if times.n_tokens != n_output:
        raise RuntimeError(f"the answer has {times.n_tokens} tokens, expected {n_output}")
    return times


def _read_events(times: StreamTimes, pieces: list[tuple[float, bytes]]) -> None:
    """An event counts at the time of the piece that ended it."""
    rest = b""
    for arrival_s, piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            text = event.removeprefix(b"data: ")
            if text == b"[DONE]":
                continue
            chunk: dict[str, Any] = json.loads(text)
            if "error" in chunk:
                raise RuntimeError(f"the stream ended with an error: {chunk['error']}")
            if chunk["choices"]:
                times.events_s.append(arrival_s)
            if chunk.get("usage"):
                times.n_tokens = chunk["usage"]["completion_tokens"]


async def stream_all(host: str, port: int, workload: Workload) -> tuple[float, list[StreamTimes]]:
    """All requests at once: seconds until the last answer is complete, and the times of each."""
    start_s = time.perf_counter()
    work = [
        stream_completion(host, port, prompt, n) for prompt, n in zip(workload.prompts, workload.n_outputs, strict=True)
    ]
    answers = await asyncio.gather(*work)
    return time.perf_counter() - start_s, list(answers)
