"""Connections from clients to the router: bytes in, whole requests out, and the way back with back-pressure.

One request of a connection is answered at a time; what a client sends ahead waits here, up to a limit.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Protocol, cast

import httptools
import msgspec

from fastdeploy.router.http1 import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    Headers,
    Request,
    RequestHead,
    error_body,
    own_response,
)
from fastdeploy.router.known_heads import KnownHeads

RECEIVE_TIMEOUT_S = 120.0  # for a whole request, once it began
IDLE_TIMEOUT_S = 75.0
LINGER_S = 2.0  # for a client to read why it is refused, while it still sends
MAX_AHEAD = 8  # requests that a client may send before the first is answered
MAX_ID_BYTES = 256


class Work(Protocol):
    """What is done for the current request of a connection."""

    def client_gone(self) -> None:
        """The client closed the connection: stop; nothing can be sent any more."""

    def client_full(self) -> None:
        """The client reads too slowly: send no more."""

    def client_ready(self) -> None:
        """It has read: go on."""


class Handler(Protocol):
    """Takes whole requests. `heads` are those that its clients sent before."""

    clients: set[ClientConnection]
    heads: KnownHeads[RequestHead]

    def handle(self, request: Request, client: ClientConnection) -> Work | None:
        """Begin to answer; None when that is done already."""


class ClientConnection(asyncio.Protocol):
    """One connection of a client; also the callbacks of httptools."""

    __slots__ = (
        "_ahead",
        "_body",
        "_closing",
        "_expects_continue",
        "_handler",
        "_headers",
        "_is_1_0",
        "_loop",
        "_n_body",
        "_n_head",
        "_n_headers",
        "_parser",
        "_receiving",
        "_refusal",
        "_request_id",
        "_since_s",
        "_target",
        "_transport",
        "_work",
        "is_busy",
        "is_full",
        "keep_alive",
    )

    def __init__(self, handler: Handler, loop: asyncio.AbstractEventLoop) -> None:
        self._handler = handler
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._work: Work | None = None
        self._ahead: deque[Request] = deque()
        self._refusal: tuple[int, str] | None = None
        self._closing = False  # nothing is read any more
        self._receiving = False  # a request began and is not whole
        self._since_s = loop.time()
        self.is_busy = False  # a request is being answered
        self.is_full = False
        self.keep_alive = True  # after the current request
        self.on_message_begin()
        self._receiving = False

    # ---- the way back --------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """A piece of the answer."""
        if self._transport is not None:
            self._transport.write(data)

    def finish(self, keep: bool = True) -> None:
        """The answer is out: take the next request, or close."""
        self.is_busy, self._work = False, None
        self._since_s = self._loop.time()
        if self._refusal is not None and keep:
            self._refuse(*self._refusal)
        elif not (keep and self.keep_alive):
            self._end()
        elif self._ahead:
            self._loop.call_soon(self._next)

    def abort(self) -> None:
        """Cut the connection: the answer cannot be completed, and the client must see that."""
        self.is_busy, self._work = False, None
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self, now_s: float | None = None) -> None:
        """Close what waits for a request, or for the rest of one, for too long; None: close what waits at all."""
        if self.is_busy or self._transport is None:
            return
        if self._refusal is not None:
            limit_s = LINGER_S
        else:
            limit_s = RECEIVE_TIMEOUT_S if self._receiving or self._closing else IDLE_TIMEOUT_S
        if now_s is None:
            if not self._receiving:
                self._transport.close()
        elif now_s - self._since_s > limit_s:
            if self._receiving and not self._closing:
                self._refuse(408, f"the request did not arrive within {RECEIVE_TIMEOUT_S:.0f} s")
            else:
                self._transport.abort()

    def _end(self) -> None:
        """No more requests; what is in the buffers still goes out, and the client closes or the sweep does."""
        self._closing = True
        self._ahead.clear()
        if self._transport is None or self._transport.is_closing():
            return
        if self._refusal is not None and self._transport.can_write_eof():
            self._transport.write_eof()  # closing now, with unread bytes, would reset what was just written
        else:
            self._transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._refusal = (status, message)
        self._since_s = self._loop.time()
        self.write(own_response(status, error_body(status, message), close=True))
        self._end()

    def _next(self) -> None:
        if self.is_busy or not self._ahead or self._transport is None or self._transport.is_closing():
            return
        self._answer(self._ahead.popleft())

    def _answer(self, request: Request) -> None:
        self.keep_alive = request.head.keep_alive
        self.is_busy = True
        work = self._handler.handle(request, self)
        if work is not None and self.is_busy:
            self._work = work
            if self.is_full:
                work.client_full()

    # ---- of asyncio ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._handler.clients.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._closing:
            return
        begins = not (self._receiving or self.is_busy or self._ahead)
        known = self._handler.heads.find(data) if begins else None
        if known is not None:
            head, body, ids = known
            request_id = ids[-1].partition(b" ")[2][:MAX_ID_BYTES] if ids else b""
            self._answer(Request(head, body, request_id or _new_id(), self._loop.time()))
            return
        had_head = self._n_head < 0
        self._feed(data)
        if begins and self._ahead and self._ahead[0].head.keep_alive:
            self._remember(data, self._ahead[0].head)
        if self._n_head >= 0 and not had_head:
            self._n_head += len(data)
            if self._n_head > MAX_HEAD_BYTES:
                self._refusal = self._refusal or (431, f"the headers exceed {MAX_HEAD_BYTES} bytes")
        if self._refusal is not None:
            if not self.is_busy:  # else the current answer goes out first
                self._refuse(*self._refusal)
            else:
                self._closing, self.keep_alive = True, False
        elif not self.is_busy:
            self._next()

    def _remember(self, data: bytes, head: RequestHead) -> None:
        names = [name for name, _ in head.headers]
        lasting = [one for one in head.headers if one[0] != b"x-request-id"]
        self._handler.heads.keep(data, msgspec.structs.replace(head, headers=lasting), names)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as exc:
                if self._parser.get_method() == b"CONNECT":
                    self._refusal = (400, "this is no proxy for other hosts")
                    return
                if self._refusal is not None:
                    return
                # An offer of another protocol is not taken up. The parser left the body unread for it: it gets the
                # same request once more, without the offer.
                data = _without_offer(self._ahead.pop()) + data[exc.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as exc:
                self._refusal = self._refusal or (400, f"this is not HTTP: {exc}")
                return

    def eof_received(self) -> None:
        """A client that sends no more is gone, like for nginx: the connection closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._handler.clients.discard(self)
        self._ahead.clear()
        self._transport = None
        self.is_busy = False
        work, self._work = self._work, None
        if work is not None:
            work.client_gone()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.is_full = True
        if self._work is not None:
            self._work.client_full()

    def resume_writing(self) -> None:
        """It has read."""
        self.is_full = False
        if self._work is not None:
            self._work.client_ready()

    # ---- of httptools --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request starts."""
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._n_head = self._n_headers = self._n_body = 0  # _n_head is -1 once the head is whole
        self._expects_continue = self._is_1_0 = False
        self._request_id = b""
        self._receiving = True
        self._since_s = self._loop.time()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer, which is dropped."""
        if self._n_head < 0:
            return
        name = name.lower()
        self._n_headers += len(name) + len(value)
        if name == b"x-request-id":
            self._request_id = value[:MAX_ID_BYTES]
        elif name == b"content-length":
            if value.isdigit() and int(value) > MAX_BODY_BYTES:
                self._too_large()
        elif name == b"expect":
            self._expects_continue = value.lower() == b"100-continue"
        self._headers.append((name, value))
        if len(self._headers) > MAX_HEADERS or self._n_headers + len(self._target) > MAX_HEAD_BYTES:
            self._refusal = self._refusal or (
                431,
                f"the headers exceed {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} in number",
            )

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._n_head = -1
        self._is_1_0 = self._parser.get_http_version() == "1.0"
        if self._expects_continue and self._refusal is None and not self.is_busy:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._n_body += len(body)
        if self._n_body > MAX_BODY_BYTES:
            self._too_large()
        elif self._refusal is None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._receiving = False
        if self._refusal is not None:
            return
        if len(self._ahead) >= MAX_AHEAD:
            self._refusal = (429, f"more than {MAX_AHEAD} requests were sent ahead on one connection")
            return
        parser = self._parser
        head = RequestHead.of(
            parser.get_method(), self._target, self._headers, self._is_1_0, parser.should_keep_alive()
        )
        self._ahead.append(Request(head, b"".join(self._body), self._request_id or _new_id(), self._loop.time()))
        self._body = []

    def _too_large(self) -> None:
        self._refusal = self._refusal or (413, f"the request body exceeds the limit of {MAX_BODY_BYTES} bytes")
        self._body = []


def _without_offer(request: Request) -> bytes:
    """The head of a request without its offer to upgrade the connection."""
    dropped = (b"connection", b"upgrade", b"http2-settings", b"expect")
    head = request.head
    lines = [b"%b: %b\r\n" % header for header in head.headers if header[0] not in dropped]
    version = b"1.0" if head.is_http_1_0 else b"1.1"
    return b"%b %b HTTP/%b\r\n%b\r\n" % (head.method, head.target, version, b"".join(lines))


def _new_id() -> bytes:
    return b"%032x" % random.getrandbits(128)  # need only be unlike others: nothing is proved by it
