"""The two endpoints that generate: from an HTTP request over a job to the bytes of an answer or of a stream."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from fastdeploy.entrypoints.openai import chat, completions
from fastdeploy.entrypoints.openai.body import UnknownFields, merge_extra, parse_object, read_body, to_struct
from fastdeploy.entrypoints.openai.error_response import error_info, log_failure
from fastdeploy.entrypoints.openai.events import Answer, EventWriter, error_events
from fastdeploy.entrypoints.openai.gathered import Gathered
from fastdeploy.entrypoints.openai.guard import ClientGone, Guard
from fastdeploy.entrypoints.openai.job import GenerationFailed, Job
from fastdeploy.entrypoints.openai.middleware import CLIENT_ID_KEY, REQUEST_ID_KEY
from fastdeploy.entrypoints.openai.schema import ChatRequest, CompletionRequest, GenerationRequest
from fastdeploy.entrypoints.openai.state import LiveRequest, LiveRequests, ServerState
from fastdeploy.observability.logs import RequestLogger

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import Generator

LOGGER = logging.getLogger(__name__)
MAX_USER_CHARS = 64

_NOT_ID = re.compile(r"[^A-Za-z0-9._\-]")
_JSON_HEADERS = [(b"content-type", b"application/json")]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must pass chunks on as they come
]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of generation request: its body, the field merged into it, the prefix of its ids, its translation."""

    body: type[GenerationRequest]
    merged: str
    prefix: str
    accept: Callable[[Any, str, ServerState, Generator], Awaitable[tuple[Job, Answer]]]


CHAT = Kind(ChatRequest, "metadata", "chatcmpl-", chat.accept)
COMPLETIONS = Kind(CompletionRequest, "suffix", "cmpl-", completions.accept)


def public_id(prefix: str, body: GenerationRequest, client_id: str | None, own_id: str, live: LiveRequests) -> str:
    """The id of a request: the body's, else that of the client's `x-request-id`, else a fresh one, with the prefix.

    A header may be shared by several requests of one trace, so an id from there that is taken gets a suffix.
    """
    if body.request_id is not None:
        return _prefixed(prefix, body.request_id)
    if client_id is not None:
        request_id = _prefixed(prefix, client_id)
        return f"{request_id}-{uuid.uuid4().hex[:12]}" if request_id in live else request_id
    user = _NOT_ID.sub("", body.user or "")[:MAX_USER_CHARS]
    return f"{prefix}{user}-{uuid.uuid4()}" if user else prefix + own_id


def _prefixed(prefix: str, request_id: str) -> str:
    return request_id if request_id.startswith(prefix) else prefix + request_id


class _Reply:
    """The answer on its way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Status 200 and the headers."""
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": list(headers)})

    async def write(self, body: bytes) -> None:
        """A piece of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self, body: bytes) -> None:
        """The last piece."""
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


class GenerationEndpoint:
    """An ASGI app for one kind of generation request.

    Headers go out with the first token, so whatever fails before has its own HTTP status; what fails later ends the
    stream with an error event. A client that leaves ends its request at once, streaming or not.
    """

    def __init__(self, kind: Kind, state: ServerState, unknown: UnknownFields) -> None:
        self._kind = kind
        self._state = state
        self._unknown = unknown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request. Raises `RequestError` as long as nothing was sent."""
        state, reply = self._state, _Reply(send)
        request_id = scope[REQUEST_ID_KEY]
        fields = parse_object(await read_body(Request(scope, receive)))
        merge_extra(fields, self._kind.merged, self._kind.body)
        body = to_struct(fields, self._kind.body, self._unknown)
        try:
            generator = state.engine()
            async with Guard(receive, state.max_waiting_s, state.silence_s, generator.health) as guard:
                public = public_id(self._kind.prefix, body, scope[CLIENT_ID_KEY], request_id, state.live)
                job, answer = await self._kind.accept(body, public, state, generator)
                last = await self._run(job, answer, generator, guard, reply)
        except ClientGone:
            RequestLogger(LOGGER, request_id).info("the client closed the connection; its request was aborted")
            return
        except Exception as exc:
            if not reply.started:
                raise
            status, info = error_info(exc)
            if status >= 500:
                log_failure(exc, request_id)
            last = error_events(info)
        await reply.finish(last)

    async def _run(self, job: Job, answer: Answer, generator: Generator, guard: Guard, reply: _Reply) -> bytes:
        """Sends all but the last piece of the answer, which is returned."""
        live = self._state.live.add(job.request_id, len(job.prompts))
        try:
            if job.stream:
                return await self._stream(job, answer, generator, live, guard, reply)
            last = await self._collect(job, answer, generator, live, guard)
        finally:
            self._state.live.remove(job.request_id)
            _log_end(job)
        await reply.start([*_JSON_HEADERS, (b"content-length", b"%d" % len(last))])
        return last

    async def _stream(
        self, job: Job, answer: Answer, generator: Generator, live: LiveRequest, guard: Guard, reply: _Reply
    ) -> bytes:
        writer = EventWriter(job, answer)
        async with aclosing(job.steps(generator, live)) as steps:
            async for k, deltas in steps:
                guard.progress()
                events = writer.step(k, deltas)
                if not reply.started:
                    await reply.start(_STREAM_HEADERS)
                if events:
                    await reply.write(events)
        if not reply.started:
            raise GenerationFailed("the engine ended the request without an answer")
        return writer.closing()

    async def _collect(self, job: Job, answer: Answer, generator: Generator, live: LiveRequest, guard: Guard) -> bytes:
        n = job.n_choices
        gathered = [Gathered() for _ in range(n * len(job.prompts))]
        async with aclosing(job.steps(generator, live)) as steps:
            async for k, deltas in steps:
                guard.progress()
                for delta in deltas:
                    gathered[k * n + delta.index].add(delta)
        if not all(choice.finished for choice in gathered):
            raise GenerationFailed("the engine ended the request without an answer")
        return msgspec.json.encode(answer.full([choice.merged() for choice in gathered]))


def _log_end(job: Job) -> None:
    first_s = None if job.first_step_s is None else round(job.first_step_s - job.created_s, 4)
    RequestLogger(LOGGER, job.request_id).info(
        "ended: prompts=%d choices=%d stream=%d prompt_tokens=%d cached_tokens=%d completion_tokens=%d finish=%s "
        "first_token_s=%s took_s=%.4f",
        len(job.prompts),
        job.n_choices,
        job.stream,
        job.n_prompt_tokens,
        job.n_cached_tokens,
        job.n_completion_tokens,
        ",".join(sorted(set(job.finish_reasons))) or "none",
        first_s,
        time.time() - job.created_s,
    )
