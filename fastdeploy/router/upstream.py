"""Connections from the router to one server: an asyncio protocol over httptools, kept for reuse.

A stream is not read by a task: bytes go from the socket's callback through the parser to the receiver of the answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import httptools

from fastdeploy.errors import FastDeployError
from fastdeploy.router.http1 import MAX_HEAD_BYTES, AnswerHead, Headers
from fastdeploy.router.known_heads import KnownHeads

CONNECT_TIMEOUT_S = 5.0
KEEP_IDLE_S = 45.0  # an api_server closes an idle connection after 60 s; we are first
MAX_IDLE = 1024
MAX_FETCHED_BYTES = 16 * 1024 * 1024


class UpstreamError(FastDeployError):
    """A server gave no whole answer.

    `kind`: connect (no connection), stale (a kept connection was closed before a byte came), disconnected (later), or
    bad_http.
    """

    def __init__(self, kind: Literal["connect", "stale", "disconnected", "bad_http", "timeout"], text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Receiver(Protocol):
    """Takes one answer: `on_head`, then `on_body` for every read, then `on_end`; `on_failure` at any moment instead."""

    def on_head(self, head: AnswerHead, n_body_bytes: int | None) -> None:
        """`n_body_bytes` is None when it is not announced."""

    def on_body(self, data: bytes) -> None:
        """All of the body that a read brought."""

    def on_end(self) -> None:
        """The answer is whole."""

    def on_failure(self, error: UpstreamError) -> None:
        """It will not be."""


class UpstreamConnection(asyncio.Protocol):
    """One TCP connection with at most one exchange at a time; also the callbacks of httptools."""

    __slots__ = (
        "_body",
        "_chunked",
        "_complete",
        "_head_seen",
        "_headers",
        "_keep_alive",
        "_n_announced",
        "_n_exchanges",
        "_n_head_bytes",
        "_parser",
        "_pool",
        "_receiver",
        "_transport",
        "answered",
        "idle_since_s",
        "usable",
    )

    def __init__(self, pool: Upstream) -> None:
        self.usable = False
        self.answered = False  # at least a byte came back in this exchange
        self.idle_since_s = 0.0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._n_exchanges = 0
        self._reset()

    def _reset(self) -> None:
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._head_seen = self._complete = self._chunked = self._keep_alive = False
        self._n_announced: int | None = None
        self._n_head_bytes = 0

    def send(self, request: bytes, receiver: Receiver) -> None:
        """Send a whole request; its answer goes to `receiver`, which may be called before this returns."""
        self._receiver, self.answered = receiver, False
        self._n_exchanges += 1
        self._reset()
        if self._transport is None or not self.usable:
            self._fail("the server closed the connection")
            return
        self._transport.write(request)

    def close(self) -> None:
        """At once, forgetting the exchange and what was not sent."""
        self.usable, self._receiver = False, None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more until `resume`: who takes the answer is slower than the server."""
        if self._transport is not None and self.usable:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Go on reading."""
        if self._transport is not None and self.usable:
            self._transport.resume_reading()

    def _fail(self, text: str, bad_http: bool = False) -> None:
        receiver, reused = self._receiver, self._n_exchanges > 1
        self.close()
        if receiver is not None:
            kind = "bad_http" if bad_http else "stale" if reused and not self.answered else "disconnected"
            receiver.on_failure(UpstreamError(kind, text))  # type: ignore[arg-type]

    # ---- of asyncio ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is up."""
        self._transport, self.usable = cast(asyncio.Transport, transport), True  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        receiver = self._receiver
        if receiver is None:
            self.close()  # nothing was asked for
            return
        is_first = not self.answered
        self.answered = True
        if is_first:
            known = self._pool.heads.find(data)
            if known is not None:
                self._take(receiver, *known)
                return
        had_head = self._head_seen
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(f"the answer is not HTTP: {exc}", bad_http=True)
            return
        if not self._head_seen:
            self._n_head_bytes += len(data)
            if self._n_head_bytes > MAX_HEAD_BYTES:
                self._fail(f"the head of the answer exceeds {MAX_HEAD_BYTES} bytes", bad_http=True)
            return
        if not had_head:
            head = AnswerHead.of(self._parser.get_status_code(), self._headers)
            if is_first and self._complete and self._keep_alive:
                self._remember(data, head)
            receiver.on_head(head, self._announced())
        body = self._body
        if body and self._receiver is receiver:
            self._body = []
            receiver.on_body(body[0] if len(body) == 1 else b"".join(body))
        if self._complete and self._receiver is receiver:
            self._finish(self._keep_alive)

    def _remember(self, data: bytes, head: AnswerHead) -> None:
        heads, names = self._pool.heads, [name for name, _ in self._headers]
        lasting = [one for one in self._headers if one[0] not in heads.varying]
        heads.keep(data, AnswerHead.of(head.status, lasting), names)

    def _take(self, receiver: Receiver, head: AnswerHead, body: bytes, lines: list[bytes]) -> None:
        """A whole answer, whose head is known but for those lines."""
        receiver.on_head(head.with_lines(lines) if lines else head, len(body))
        if body and self._receiver is receiver:
            receiver.on_body(body)
        if self._receiver is receiver:
            self._finish(True)

    def eof_received(self) -> None:
        """The server sends no more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.usable = False
        receiver = self._receiver
        if receiver is not None and exc is None and self._head_seen and self._ends_with_connection():
            self._finish(False)
            return
        reason = f" ({exc})" if exc else ""
        self._fail(f"the server closed the connection before the end of its answer{reason}")

    def _announced(self) -> int | None:
        return None if self._chunked else self._n_announced

    def _ends_with_connection(self) -> bool:
        return not self._chunked and self._n_announced is None

    def _finish(self, keep: bool) -> None:
        receiver, self._receiver = self._receiver, None
        if keep and self.usable:
            self.resume()
            self._pool.keep(self)
        else:
            self.close()
        if receiver is not None:
            receiver.on_end()

    # ---- of httptools --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A message starts; one behind a complete one was not asked for."""
        if self._complete:
            self.usable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer."""
        if self._head_seen:
            return
        name = name.lower()
        if name == b"content-length":
            self._n_announced = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The status is known."""
        if self._parser.get_status_code() >= 200:
            self._head_seen = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if self._head_seen:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()
        else:
            self._reset()


class Upstream:
    """All connections to one address. `host_header` is how a request names it."""

    def __init__(self, host: str, port: int, unix_path: str = "") -> None:
        """`unix_path`: a socket to connect to instead."""
        self._host, self._port, self._unix_path = host, port, unix_path
        self.host_header = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        self.heads: KnownHeads[AnswerHead] = KnownHeads(of_requests=False)
        self._idle: list[UpstreamConnection] = []

    def idle(self) -> UpstreamConnection | None:
        """A kept connection, the one used last: it is the likeliest to be alive."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises `UpstreamError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = UpstreamConnection(self)
                if self._unix_path:
                    await loop.create_unix_connection(lambda: connection, self._unix_path)
                else:
                    await loop.create_connection(lambda: connection, self._host, self._port)
        except TimeoutError:
            raise UpstreamError("connect", f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from None
        except OSError as exc:
            raise UpstreamError("connect", f"no connection: {exc.strerror or exc}") from None
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        """A connection whose exchange has ended."""
        if len(self._idle) >= MAX_IDLE:
            connection.close()
            return
        connection.idle_since_s = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def close_idle(self, kept_since_s: float) -> None:
        """Close those that wait since before that loop time, and forget the dead."""
        alive: list[UpstreamConnection] = []
        for connection in self._idle:
            if not connection.usable or connection.idle_since_s < kept_since_s:
                connection.close()
            else:
                alive.append(connection)
        self._idle = alive

    def close(self) -> None:
        """Close all idle connections."""
        self.close_idle(float("inf"))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes


class _Collector:
    """Receives one answer into a future."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = bytearray()

    def on_head(self, head: AnswerHead, n_body_bytes: int | None) -> None:
        """See `Receiver`."""
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        """See `Receiver`."""
        self._body += data
        if len(self._body) > MAX_FETCHED_BYTES:
            self.on_failure(UpstreamError("bad_http", f"the answer exceeds {MAX_FETCHED_BYTES} bytes"))

    def on_end(self) -> None:
        """See `Receiver`."""
        if not self.answer.done():
            self.answer.set_result(Answer(self._status, bytes(self._body)))

    def on_failure(self, error: UpstreamError) -> None:
        """See `Receiver`."""
        if not self.answer.done():
            self.answer.set_exception(error)


async def fetch(
    upstream: Upstream,
    method: bytes,
    target: bytes,
    timeout_s: float,
    headers: Headers | None = None,
    body: bytes = b"",
) -> Answer:
    """One small exchange, on a kept connection if there is one. Raises `UpstreamError`, also for a timeout."""
    lines = b"".join(b"%b: %b\r\n" % header for header in headers or ())
    length = b"content-length: %d\r\n" % len(body) if method != b"GET" else b""
    request = b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n%b" % (method, target, upstream.host_header, lines, length, body)
    try:
        async with asyncio.timeout(timeout_s):
            connection = upstream.idle()
            if connection is not None:
                try:
                    return await _exchange(connection, request)
                except UpstreamError as exc:
                    if exc.kind != "stale":
                        raise
            return await _exchange(await upstream.connect(), request)
    except TimeoutError:
        raise UpstreamError("timeout", f"no answer within {timeout_s:g} s") from None


async def _exchange(connection: UpstreamConnection, request: bytes) -> Answer:
    collector = _Collector()
    connection.send(request, collector)
    try:
        return await collector.answer
    except BaseException:
        connection.close()
        raise
