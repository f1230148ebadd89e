"""HTTP/1.1 to one server, for many streams at once: an asyncio protocol over httptools, connections kept for reuse.

A stream is not read by a task: bytes go from the socket's callback through the parser to a sink, and the task that
asked wakes once, at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from fastdeploy.errors import ConfigError, FastDeployError

CONNECT_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.5  # how often silent connections are looked for


class ExchangeFailed(FastDeployError):
    """A request that got no whole answer; `kind` is connect, disconnected, timeout or bad_http."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Sink(Protocol):
    """Takes the body of an answer with status 200 as it comes; `read_s` is `time.perf_counter()` of the read."""

    def feed(self, data: bytes, read_s: float) -> None:
        """The next bytes."""


class Collected:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.data = bytearray()

    def feed(self, data: bytes, read_s: float) -> None:
        """The next bytes."""
        self.data += data


class Connection(asyncio.Protocol):
    """One TCP connection with at most one exchange at a time; also the callbacks of httptools."""

    def __init__(self) -> None:
        self.usable = False
        self.answered = False  # at least a byte came back in this exchange
        self.read_s = 0.0  # of the last read, or of the last request's write
        self.status = 0
        self.error_body = Collected()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._sink: Sink = self.error_body
        self._feed = self._sink.feed
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send a whole request and wait for the whole answer; then `status` and, unless it is 200, `error_body` hold.

        Raises ExchangeFailed. Cancelling closes the connection.
        """
        if self._transport is None or not self.usable:
            raise ExchangeFailed("disconnected", "the server closed the connection")
        self._sink, self.error_body, self.status, self.answered = sink, Collected(), 0, False
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self.read_s = time.perf_counter()
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._done = self._parser = None

    def fail(self, kind: str, text: str) -> None:
        """End the exchange, if there is one, with that reason."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(ExchangeFailed(kind, text))
        self.close()

    def close(self) -> None:
        """At once, without waiting for what was not sent."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # ---- of asyncio ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is up."""
        self._transport, self.usable = cast(asyncio.Transport, transport), True  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self.read_s, self.answered = time.perf_counter(), True
        if self._parser is None:
            self.close()  # nothing was asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.fail("bad_http", f"the answer is not HTTP: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.usable = False
        reason = f" ({exc})" if exc else ""
        self.fail("disconnected", f"the server closed the connection before the end of its answer{reason}")

    # ---- of httptools --------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        """The status is known."""
        if self._parser is not None:
            self.status = self._parser.get_status_code()
        self._feed = (self._sink if self.status == 200 else self.error_body).feed

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._feed(body, self.read_s)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self.usable = self.usable and self._parser is not None and self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class HttpClient:
    """All connections to one server. Answers may take as long as they like, but be silent for `timeout_s` at most."""

    def __init__(self, base_url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url {base_url}: expected http://HOST:PORT")
        try:
            port = parts.port
        except ValueError as exc:
            raise ConfigError(f"--base-url {base_url}: {exc}") from None
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._timeout_s = timeout_s
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: */*\r\n".encode()
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ConfigError("--api-key: it must be printable ASCII")
            self._headers += f"Authorization: Bearer {api_key}\r\n".encode()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncGenerator[None, None]:
        """Inside, silent connections time out; at the end all connections are closed."""
        watcher = asyncio.create_task(self._end_silent())
        try:
            yield
        finally:
            watcher.cancel()
            for connection in (*self._idle, *self._busy):
                connection.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises ExchangeFailed."""
        sink = Collected()
        status, error_body = await self._ask(b"GET", path, b"", sink)
        return status, bytes(sink.data) if status == 200 else error_body

    async def post(self, path: str, body: bytes, sink: Sink) -> tuple[int, bytes]:
        """The status; a body with status 200 goes to `sink`, any other is returned. Raises ExchangeFailed."""
        return await self._ask(b"POST", path, body, sink)

    async def _ask(self, method: bytes, path: str, body: bytes, sink: Sink) -> tuple[int, bytes]:
        request = b"%s %s HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            method,
            (self._prefix + path).encode(),
            self._headers,
            len(body),
            body,
        )
        connection = self._reusable()
        if connection is not None:
            try:
                return await self._exchange(connection, request, sink)
            except ExchangeFailed as exc:
                # A server may close a connection that waited for too long just when a request comes in; that request
                # was not looked at and is sent once more.
                if exc.kind != "disconnected" or connection.answered:
                    raise
        return await self._exchange(await self._connect(), request, sink)

    async def _exchange(self, connection: Connection, request: bytes, sink: Sink) -> tuple[int, bytes]:
        self._busy.add(connection)
        try:
            await connection.exchange(request, sink)
        finally:
            self._busy.discard(connection)
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()
        return connection.status, bytes(connection.error_body.data)

    def _reusable(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._ssl)
        except TimeoutError:
            raise ExchangeFailed("connect", f"{self.url} did not answer within {CONNECT_TIMEOUT_S:.0f} s") from None
        except OSError as exc:
            raise ExchangeFailed("connect", f"{self.url}: {exc.strerror or exc}") from None
        return connection

    async def _end_silent(self) -> None:
        while True:
            await asyncio.sleep(min(LOOK_EVERY_S, self._timeout_s / 4))
            latest_s = time.perf_counter() - self._timeout_s
            for connection in [one for one in self._busy if one.read_s < latest_s]:
                connection.fail("timeout", f"the server was silent for {self._timeout_s:g} s (--timeout)")
