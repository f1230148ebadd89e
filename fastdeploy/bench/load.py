"""The load generator: sends the requests of a workload to a server, in a closed or an open loop, and notes their times.

Everything runs on one event loop. What goes wrong with a request is kept with it; only a server that takes no
connections any more ends the run early, with a reason.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastdeploy.bench.connection import ExchangeFailed, HttpClient
from fastdeploy.bench.distribution import Timing
from fastdeploy.bench.sse import EventReader, chunk_decoder, message_of
from fastdeploy.bench.workloads import Request, folded

MAX_CONNECT_FAILURES = 5  # in a row, without an answer in between: then nobody is there
CHAT_SUFFIX = "/chat/completions"
# About one token each in most vocabularies.
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How requests are put to the server."""

    endpoint: str
    model: str
    vocab_size: int | None = None
    text_prompts: bool = False
    exact_length: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def body(self, request: Request) -> bytes:
        """The JSON of one request."""
        ids = folded(request.make_ids(), self.vocab_size)
        content: dict[str, Any] = {"model": self.model}
        if self.endpoint.endswith(CHAT_SUFFIX):
            content["messages"] = [{"role": "user", "content": _words(ids)}]
        else:
            content["prompt"] = _words(ids) if self.text_prompts else ids
        content |= {"max_tokens": request.n_output, "temperature": 0, "stream": True}
        content["stream_options"] = {"include_usage": True}
        if self.exact_length:
            content |= {"ignore_eos": True, "min_tokens": request.n_output}
        return msgspec.json.encode({**content, **self.extra_body})


def _words(ids: Sequence[int]) -> str:
    return " ".join(WORDS[i % len(WORDS)] for i in ids)


@dataclass(slots=True)
class Answer:
    """What came of one request; times are of `time.perf_counter()`. `error` is its kind, None for a whole answer."""

    index: int
    request: Request
    start_s: float
    end_s: float = 0.0
    events_s: array[float] = field(default_factory=lambda: array("d"))
    n_input: int = 0
    n_output: int = 0
    n_cached_tokens: int | None = None
    counted_by_server: bool = True
    error: str | None = None
    error_text: str = ""

    @property
    def timing(self) -> Timing:
        """Of a whole answer: until the first token, between tokens on average, until the last one."""
        first_s, last_s = self.events_s[0], self.events_s[-1]
        n_later = self.n_output - 1
        tpot_s = (last_s - first_s) / n_later if n_later > 0 else None
        return Timing(first_s - self.start_s, tpot_s, last_s - self.start_s)


@dataclass(slots=True)
class LoadRun:
    """All answers of a run, in the order of their ends, and how the run went."""

    answers: list[Answer] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float = 0.0
    cpu_s: float = 0.0  # of this process: the load generator's own work
    peak_concurrency: int = 0
    late_s: list[float] = field(default_factory=list)  # open loop: how long after its time each request was sent
    stopped: str | None = None  # why not all requests were sent


class LoadGenerator:
    """Sends requests; `on_end` hears of every answer."""

    def __init__(self, client: HttpClient, target: Target, on_end: Callable[[Answer], None]) -> None:
        self._client = client
        self._target = target
        self._on_end = on_end
        self._decoder = chunk_decoder()
        self._run = LoadRun()
        self._n_running = 0
        self._n_connect_failures = 0
        self._made: dict[int, bytes] = {}  # bodies of requests, by index, that are ready before their turn

    async def closed_loop(self, requests: Sequence[Request], concurrency: int) -> LoadRun:
        """Keeps `concurrency` requests running until all are answered."""
        queue = iter(enumerate(requests))
        first = requests[:concurrency]  # they leave together: none waits until the next one is made
        self._made = {index: self._target.body(request) for index, request in enumerate(first)}
        return await self._measured([self._worker(queue) for _ in range(min(concurrency, len(requests)))])

    async def open_loop(self, requests: Sequence[Request]) -> LoadRun:
        """Sends each request at its arrival time, however many are running."""
        return await self._measured([self._dispatcher(requests)])

    async def send(self, index: int, request: Request, body: bytes) -> Answer:
        """One request, until its answer is whole or has failed; raises nothing but a cancellation."""
        reader = EventReader(self._decoder)
        answer = Answer(index, request, time.perf_counter())
        self._n_running += 1
        self._run.peak_concurrency = max(self._run.peak_concurrency, self._n_running)
        try:
            status, error_body = await self._client.post(self._target.endpoint, body, reader)
            self._n_connect_failures = 0
            if status != 200:
                answer.error, answer.error_text = f"http_{status}", _error_text(error_body)
        except ExchangeFailed as exc:
            answer.error, answer.error_text = exc.kind, str(exc)
            self._n_connect_failures = self._n_connect_failures + 1 if exc.kind == "connect" else 0
            if self._n_connect_failures >= MAX_CONNECT_FAILURES:
                self._run.stopped = f"the server takes no connections any more: {exc}"
        except asyncio.CancelledError:
            answer.error, answer.error_text = "interrupted", "the benchmark was ended"
            raise
        finally:
            self._n_running -= 1
            answer.end_s = time.perf_counter()
            _take(answer, reader)
            self._run.answers.append(answer)
            self._on_end(answer)
        return answer

    async def _measured(self, work: Sequence[Any]) -> LoadRun:
        """Runs `work` to its end, or until the user interrupts: then the answers so far are the result."""
        run, cpu_start_s = self._run, time.process_time()
        run.start_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                for one in work:
                    tasks.create_task(one)
        except asyncio.CancelledError:
            run.stopped = "interrupted"
        run.end_s, run.cpu_s = time.perf_counter(), time.process_time() - cpu_start_s
        return run

    async def _worker(self, queue: Iterator[tuple[int, Request]]) -> None:
        for index, request in queue:
            if self._run.stopped:
                return
            await self.send(index, request, self._made.pop(index, b"") or self._target.body(request))

    async def _dispatcher(self, requests: Sequence[Request]) -> None:
        """Makes the next request ready before its time comes, so that it leaves on time."""
        async with asyncio.TaskGroup() as tasks:
            for index, request in enumerate(requests):
                body = self._target.body(request)
                due_s = self._run.start_s + request.arrival_s
                while (left_s := due_s - time.perf_counter()) > 0 and not self._run.stopped:
                    await asyncio.sleep(min(left_s, 0.5))
                if self._run.stopped:
                    return
                self._run.late_s.append(max(time.perf_counter() - due_s, 0.0))
                tasks.create_task(self.send(index, request, body))
                await asyncio.sleep(0)  # it leaves before the next one is made


def _take(answer: Answer, reader: EventReader) -> None:
    """What the stream brought, and whether that is a whole answer."""
    if not reader.events_s and reader.finish_reason is not None and reader.n_output:
        reader.events_s.append(reader.finish_s)  # tokens without any text: half a character, say
    answer.events_s = reader.events_s
    answer.counted_by_server = reader.n_output is not None
    answer.n_input = answer.request.n_input if reader.n_input is None else reader.n_input
    answer.n_output = len(reader.events_s) if reader.n_output is None else reader.n_output
    answer.n_cached_tokens = reader.n_cached_tokens
    if answer.error is not None:
        return
    if reader.problem is not None:
        answer.error, answer.error_text = reader.problem
    elif reader.finish_reason in ("abort", "error"):
        answer.error, answer.error_text = "aborted", f"finish_reason {reader.finish_reason}"
    elif not reader.done and reader.finish_reason is None:
        answer.error, answer.error_text = "cut_short", "the stream ended without [DONE] and without a finish_reason"
    elif not reader.events_s:
        answer.error, answer.error_text = "no_tokens", "the answer has no text"


def _error_text(body: bytes) -> str:
    try:
        content = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return message_of(body.decode(errors="replace"))
    return message_of(content.get("error", content) if isinstance(content, dict) else content)
