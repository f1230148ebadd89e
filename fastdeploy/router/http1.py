"""HTTP/1.1 as the router speaks it: a request in memory, the heads it writes, the limits it keeps. No sockets here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from types import MappingProxyType

import msgspec

MAX_HEAD_BYTES = 64 * 1024  # request line and headers
MAX_HEADERS = 128
MAX_BODY_BYTES = 32 * 1024 * 1024  # what an api_server takes

Headers = list[tuple[bytes, bytes]]  # names in lower case

# Of one connection, not of the message; and what the router writes itself.
_OWN_REQUEST = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)
_OWN_RESPONSE = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_STATUS_LINES: Mapping[int, bytes] = MappingProxyType(
    {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
)
_ERROR_KINDS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        400: ("invalid_request_error", "invalid_value"),
        429: ("rate_limit_error", "rate_limit_exceeded"),
        502: ("api_connection_error", "connection_error"),
        503: ("server_error", "engine_unavailable"),
        504: ("timeout_error", "timeout"),
    }
)


class RequestHead(msgspec.Struct, frozen=True):
    """The head of a request, without its id. `passed` are the lines that go on to a server."""

    method: bytes
    target: bytes  # as the client wrote it: path and query
    path: bytes  # the target without its query
    headers: Headers
    passed: bytes
    is_http_1_0: bool
    keep_alive: bool

    @classmethod
    def of(cls, method: bytes, target: bytes, headers: Headers, is_http_1_0: bool, keep_alive: bool) -> RequestHead:
        """The head with these headers."""
        passed = _lines(headers, _OWN_REQUEST)
        return cls(method, target, target.partition(b"?")[0], headers, passed, is_http_1_0, keep_alive)


class Request(msgspec.Struct):
    """A whole request of a client."""

    head: RequestHead
    body: bytes
    request_id: bytes  # the client's x-request-id, or a new one
    received_s: float  # loop time of its last byte

    def forwarded(self, host: bytes, body: bytes | None = None) -> bytes:
        """The request as it goes to the server at `host`: all headers but those of the client's connection.

        `body` replaces the client's.
        """
        head, body = self.head, self.body if body is None else body
        length = b"content-length: %d\r\n" % len(body) if body or head.method != b"GET" else b""
        return b"%b %b HTTP/1.1\r\nhost: %b\r\nx-request-id: %b\r\n%b%b\r\n%b" % (
            head.method,
            head.target,
            host,
            self.request_id,
            head.passed,
            length,
            body,
        )


class AnswerHead(msgspec.Struct, frozen=True):
    """The head of an answer. `start` is its first line and the lines that go on to the client."""

    status: int
    start: bytes
    has_id: bool  # among those lines is an x-request-id
    is_events: bool

    @classmethod
    def of(cls, status: int, headers: Headers) -> AnswerHead:
        """The head with these headers."""
        names = [name for name, _ in headers]
        is_events = any(
            name == b"content-type" and value[:17].lower() == b"text/event-stream" for name, value in headers
        )
        start = (_STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status) + _lines(headers, _OWN_RESPONSE)
        return cls(status, start, b"x-request-id" in names, is_events)

    def with_lines(self, lines: list[bytes]) -> AnswerHead:
        """The same with more lines, of ids or dates."""
        start = b"%b%b\r\n" % (self.start, b"\r\n".join(lines))
        has_id = self.has_id or any(line[:1] in b"xX" for line in lines)
        return AnswerHead(self.status, start, has_id, self.is_events)

    def written(self, framing: bytes, request_id: bytes) -> bytes:
        """The head for a client; `framing` is whole header lines with their ends."""
        if self.has_id:
            return b"%b%b\r\n" % (self.start, framing)
        return b"%bx-request-id: %b\r\n%b\r\n" % (self.start, request_id, framing)


def _lines(headers: Headers, own: frozenset[bytes]) -> bytes:
    """Those headers that go on: not the `own` ones, nor those that `Connection` declares to be of that connection."""
    named: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name == b"connection":
            named = frozenset(token.strip().lower() for token in value.split(b","))
            break
    passed = [b"%b: %b\r\n" % header for header in headers if header[0] not in own and header[0] not in named]
    return b"".join(passed)


def own_response(
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    request_id: bytes = b"",
    headers: Iterable[tuple[bytes, bytes]] = (),
    close: bool = False,
) -> bytes:
    """A whole answer of the router itself."""
    own: Headers = [*headers]
    if body:
        own.append((b"content-type", content_type))
    if status in (429, 503):
        own.append((b"retry-after", b"1"))
    framing = b"content-length: %d\r\n" % len(body) + (b"connection: close\r\n" if close else b"")
    return AnswerHead.of(status, own).written(framing, request_id or b"-") + body


def error_body(status: int, message: str) -> bytes:
    """An error as OpenAI's API writes it."""
    kind, code = _ERROR_KINDS.get(status) or ("server_error" if status >= 500 else "invalid_request_error", "refused")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def error_events(status: int, message: str) -> bytes:
    """The end of an event stream that cannot go on."""
    return b"data: " + error_body(status, message) + b"\n\ndata: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    """A piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
