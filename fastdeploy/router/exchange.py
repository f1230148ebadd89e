"""One forwarded request: a server is picked, the request sent, the answer passed on as it comes.

Another server is tried only as long as the client got no byte, and only when the first one gave no answer: it could
not be reached, it died, or it refused (429, 503). Generating twice costs time but changes nothing, and the client gets
one answer. Whatever goes wrong later ends an event stream with an error event, and cuts any other answer, whose
framing then shows that it is incomplete.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastdeploy.observability.logs import RequestLogger
from fastdeploy.router.downstream import ClientConnection
from fastdeploy.router.http1 import (
    LAST_CHUNK,
    Headers,
    Request,
    chunk,
    error_body,
    error_events,
    own_response,
    response_head,
)
from fastdeploy.router.ledger import Ticket
from fastdeploy.router.policies import Ask
from fastdeploy.router.prompt_text import PromptFigures
from fastdeploy.router.registry import Server
from fastdeploy.router.upstream import UpstreamConnection, UpstreamError

if TYPE_CHECKING:
    from fastdeploy.router.proxy import Proxy

LOGGER = logging.getLogger(__name__)
MAX_ATTEMPTS = 4  # servers that one request is offered to
HOLD_BYTES = (
    256 * 1024
)  # a whole answer up to this size is held until it is complete, so that it can be asked for again
MAX_PART_BYTES = 4 * 1024 * 1024  # of an event that is not complete
CLIENT_GONE = 499  # the usual figure for a client that left before its answer began
_REFUSALS = frozenset({429, 503})  # the server did nothing with the request
_END_MARK = b"data: [DONE]\n\n"


class Exchange:
    """The work for one request; a `Receiver` of the server's answer."""

    __slots__ = (
        "_asked",
        "_client",
        "_connection",
        "_figures",
        "_head",
        "_held",
        "_is_chunked",
        "_is_events",
        "_is_full",
        "_is_refused",
        "_is_sent",
        "_last",
        "_passes",
        "_proxy",
        "_request",
        "_server",
        "_status",
        "_task",
        "_ticket",
        "_tried",
        "deadline_s",
    )

    def __init__(self, proxy: Proxy, request: Request, client: ClientConnection, figures: PromptFigures) -> None:
        self._proxy, self._request, self._client = proxy, request, client
        self._figures = figures
        self.deadline_s = request.received_s + proxy.timeout_s
        self._tried: list[str] = []
        self._server: Server | None = None
        self._ticket: Ticket | None = None
        self._connection: UpstreamConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_sent = False  # the client got a byte
        self._is_full = False  # the client takes no more at the moment
        self._status = 0
        self._reset()

    def _reset(self) -> None:
        self._head = b""
        self._held = b""
        self._last = b""
        self._is_chunked = self._is_events = self._is_refused = self._passes = False

    # ---- the way there -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send the request to a server that has not been tried. Called again for every attempt."""
        servers = self._proxy.registry.available_without(self._tried)
        if not servers:
            if self._tried:
                self._answer(502, f"Failed to connect to backend service: {len(self._tried)} tried, none answered")
            else:
                self._answer(503, "No available workers")
            return
        figures, policy = self._figures, self._proxy.policy
        ask = Ask(figures.n_tokens, figures.text, self._request.received_s)
        server = self._server = servers[policy.pick([server.load for server in servers], ask)]
        self._tried.append(server.url)
        self._ticket = Ticket(server.load, figures.n_tokens, figures.is_stream)
        if LOGGER.isEnabledFor(logging.DEBUG):
            self._log().debug(
                "select worker (mixed): %s, count: %d, tokens: %d", server.url, server.load.n_requests, figures.n_tokens
            )
        connection = server.upstream.idle()
        if connection is not None:
            self._send(connection)
        else:
            self._connect(server)

    def _connect(self, server: Server) -> None:
        self._task = asyncio.get_running_loop().create_task(self._send_on_new(server))

    async def _send_on_new(self, server: Server) -> None:
        try:
            connection = await server.upstream.connect()
        except UpstreamError as exc:
            self._task = None
            self.on_failure(exc)
            return
        self._task = None
        self._send(connection)

    def _send(self, connection: UpstreamConnection) -> None:
        assert self._server is not None
        self._connection = connection
        if self._is_full:
            connection.pause()
        connection.send(self._request.forwarded(self._server.upstream.host_header), self)

    # ---- the way back: of Receiver -------------------------------------------------------------------------------

    def on_head(self, status: int, headers: Headers, n_body_bytes: int | None) -> None:
        """The answer begins."""
        self._status = status
        if status in _REFUSALS and self._may_try_another():
            self._is_refused = True
            return
        for name, value in headers:
            if name == b"content-type":
                self._is_events = value[:17].lower() == b"text/event-stream"
                break
        has_body = status not in (204, 304)
        if n_body_bytes is not None or not has_body:
            framing = b"content-length: %d\r\n" % (n_body_bytes or 0) if has_body else b""
        elif self._request.is_http_1_0:
            framing, self._client.keep_alive = b"", False
        else:
            framing, self._is_chunked = b"transfer-encoding: chunked\r\n", True
        if not self._client.keep_alive:
            framing += b"connection: close\r\n"
        elif self._request.is_http_1_0:
            framing += b"connection: keep-alive\r\n"
        self._head = response_head(status, headers, framing, self._request.request_id)
        self._passes = not self._is_events and (n_body_bytes is None or n_body_bytes > HOLD_BYTES)

    def on_body(self, data: bytes) -> None:
        """A piece of the answer; of event streams, whole events are passed on."""
        if self._is_refused:
            return
        if self._is_events:
            if self._held:
                data, self._held = self._held + data, b""
            if not data.endswith((b"\n\n", b"\r\n\r\n")):
                end = _end_of_events(data)
                self._held, data = data[end:], data[:end]
                if len(self._held) > MAX_PART_BYTES:
                    self._drop_upstream()
                    self.on_failure(UpstreamError("bad_http", f"an event exceeds {MAX_PART_BYTES} bytes"))
                    return
                if not data:
                    return
            if self._ticket is not None:
                self._ticket.events(data.count(b"\n\n"))
            self._last = data[-len(_END_MARK) :]
        elif not self._passes:
            self._held = self._held + data if self._held else data
            return
        if self._is_chunked:
            data = chunk(data)
        if not self._is_sent:
            data = self._head + data
            self._is_sent = True
        self._client.write(data)

    def on_end(self) -> None:
        """The answer is whole."""
        self._connection = None
        if self._is_refused:
            self._release()
            assert self._server is not None
            self._proxy.refused(self._server, self._status)
            self._reset()
            self.start()
            return
        rest = self._held
        if self._is_chunked:
            rest = (chunk(rest) if rest else b"") + LAST_CHUNK
        self._client.write(rest if self._is_sent else self._head + rest)
        self._is_sent = True
        if self._server is not None:
            self._server.n_failures = 0
        self._done(self._status)
        self._client.finish()

    def on_failure(self, error: UpstreamError) -> None:
        """The server gave no whole answer."""
        server = self._server
        assert server is not None
        self._connection = None
        if error.kind == "stale":
            # It closed a connection that had waited for long just when the request came in, or it has died: a new
            # connection tells which.
            self._connect(server)
            return
        if self._is_sent and self._last == _END_MARK:
            self.on_end()
            return
        self._release()
        self._proxy.failed(server, error)
        self._log().warning("%s: %s: %s", server.url, error.kind, error)
        if self._may_try_another():
            self._proxy.metrics.n_retries += 1
            self._reset()
            self.start()
        else:
            self._break(502, f"Failed to connect to backend service: {error}")

    # ---- of Work -------------------------------------------------------------------------------------------------

    def client_gone(self) -> None:
        """The client left: so does the request, which frees its place in the engine at once."""
        self._drop_upstream()
        self._proxy.metrics.n_clients_gone += 1
        self._log().debug("the client closed the connection; its request was cut")
        self._done(self._status if self._is_sent else CLIENT_GONE)

    def client_full(self) -> None:
        """The client reads slowly: so does the router."""
        self._is_full = True
        if self._connection is not None:
            self._connection.pause()

    def client_ready(self) -> None:
        """It has read."""
        self._is_full = False
        if self._connection is not None:
            self._connection.resume()

    # ---- ends ----------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """The time is up."""
        self._drop_upstream()
        self._log().warning("not answered within %g s (--request-timeout-secs)", self._proxy.timeout_s)
        self._break(504, f"the request was not answered within {self._proxy.timeout_s:g} s (--request-timeout-secs)")

    def stop(self, reason: str) -> None:
        """The router ends."""
        self._drop_upstream()
        self._break(503, reason)

    def _may_try_another(self) -> bool:
        return (
            not self._is_sent
            and len(self._tried) < MAX_ATTEMPTS
            and bool(self._proxy.registry.available_without(self._tried))
        )

    def _break(self, status: int, message: str) -> None:
        """End without a whole answer."""
        if not self._is_sent:
            self._answer(status, message)
            return
        self._done(self._status)
        if not self._is_events:
            self._client.abort()
            return
        events = error_events(status, message)
        self._client.write(chunk(events) + LAST_CHUNK if self._is_chunked else events)
        if self._is_chunked:
            self._client.finish()
        else:
            self._client.finish(keep=False)

    def _answer(self, status: int, message: str) -> None:
        request_id = self._request.request_id
        close = not self._client.keep_alive
        self._client.write(own_response(status, error_body(status, message), request_id=request_id, close=close))
        self._done(status)
        self._client.finish()

    def _drop_upstream(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _release(self) -> None:
        if self._ticket is not None:
            self._ticket.end()
            self._ticket = None

    def _done(self, status: int) -> None:
        self._release()
        self._proxy.ended(self, self._request, self._server.url if self._server is not None else "", status)

    def _log(self) -> RequestLogger:
        return RequestLogger(LOGGER, self._request.request_id.decode("latin-1"))


def _end_of_events(data: bytes) -> int:
    """Where the last whole event of a piece of a stream ends; 0 when there is none."""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
