"""HTTP/1.1 as the router speaks it: a request in memory, the heads it writes, the limits it keeps. No sockets here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(slots=True)
class Request:
    """A whole request of a client."""

    method: bytes
    target: bytes  # as the client wrote it: path and query
    headers: Headers
    body: bytes
    is_http_1_0: bool
    request_id: bytes  # the client's x-request-id, or a new one
    received_s: float  # loop time of its last byte

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]

    def forwarded(self, host: bytes, body: bytes | None = None) -> bytes:
        """The request as it goes to the server at `host`: all headers but those of the client's connection.

        `body` replaces the client's.
        """
        body = self.body if body is None else body
        named = _named(self.headers)
        parts = [self.method, b" ", self.target, b" HTTP/1.1\r\nhost: ", host, b"\r\nx-request-id: ", self.request_id]
        for name, value in self.headers:
            if name not in _OWN_REQUEST and name not in named:
                parts += (b"\r\n", name, b": ", value)
        if body or self.method != b"GET":
            parts.append(b"\r\ncontent-length: %d" % len(body))
        parts += (b"\r\n\r\n", body)
        return b"".join(parts)


def _named(headers: Headers) -> frozenset[bytes]:
    """Headers that `Connection` declares to be of that connection only."""
    for name, value in headers:
        if name == b"connection":
            return frozenset(token.strip().lower() for token in value.split(b","))
    return frozenset()


def response_head(status: int, headers: Headers, framing: bytes, request_id: bytes) -> bytes:
    """The head of a server's answer for the client; `framing` is a whole header line with its end."""
    named = _named(headers)
    parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status]
    has_id = False
    for name, value in headers:
        if name not in _OWN_RESPONSE and name not in named:
            has_id = has_id or name == b"x-request-id"
            parts += (name, b": ", value, b"\r\n")
    if not has_id:
        parts += (b"x-request-id: ", request_id, b"\r\n")
    parts += (framing, b"\r\n")
    return b"".join(parts)


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
    return response_head(status, own, framing, request_id or b"-") + body


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
