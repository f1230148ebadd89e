"""One forwarded request: a server is picked, the request sent, the answer passed on as it comes.

Another server is tried only as long as the client got no byte, and only when the first one gave no answer: it could
not be reached, it died, or it refused (429, 503). Generating twice costs time but changes nothing, and the client gets
one answer. Whatever goes wrong later ends an event stream with an error event, and cuts any other answer, whose
framing then shows that it is incomplete.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdeploy.errors import InvalidRequest
from fastdeploy.observability.logs import RequestLogger
from fastdeploy.router.downstream import ClientConnection
from fastdeploy.router.http1 import (
    LAST_CHUNK,
    AnswerHead,
    Request,
    chunk,
    error_body,
    error_events,
    own_response,
)
from fastdeploy.router.ledger import Ticket
from fastdeploy.router.placement import Placement, SplitBody, given_up
from fastdeploy.router.prefill_leg import PrefillLeg
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

    # What most requests never change is not written for each of them.
    _placement: Placement | None = None
    _leg: PrefillLeg | None = None
    _n_retries = _n_preempted = 0
    _body: bytes | None = None  # what goes to servers instead of the client's
    _tried: Sequence[str] = ()
    _server: Server | None = None
    _ticket: Ticket | None = None
    _connection: UpstreamConnection | None = None
    _task: asyncio.Task[None] | None = None
    _is_sent = False  # the client got a byte
    _is_full = False  # the client takes no more at the moment
    _status = 0
    _head = _held = _last = b""  # of the answer for the client; of an event that is not whole; of the last event
    _is_chunked = _is_events = _is_refused = _passes = False

    def __init__(
        self,
        proxy: Proxy,
        request: Request,
        client: ClientConnection,
        figures: PromptFigures,
        split: SplitBody | None = None,
    ) -> None:
        """`split` is the body when servers work in pairs."""
        self._proxy, self._request, self._client = proxy, request, client
        self._figures, self._split = figures, split
        self.deadline_s = request.received_s + proxy.timeout_s

    def _reset(self) -> None:
        """Forget the answer of a server that is not asked any more."""
        self._head = b""
        self._held = b""
        self._last = b""
        self._is_chunked = self._is_events = self._is_refused = self._passes = False

    # ---- the way there -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send the request to servers that have not failed it. Called again for every attempt."""
        placer, request = self._proxy.placer, self._request
        try:
            is_begun = self._split is not None and self._split.is_begun
            placement = placer.place(self._figures, request.received_s, self._tried, is_begun)
        except InvalidRequest as exc:
            self._answer(exc.status, str(exc))
            return
        if placement is None:
            if self._tried:
                self._answer(502, f"Failed to connect to backend service: {len(self._tried)} tried, none answered")
            else:
                self._answer(503, placer.nobody)
            return
        self._placement, self._server = placement, placement.server
        self._ticket = self._take(placement.server)
        if self._split is not None:
            self._body = self._split.written(placement, self._n_retries)
        if placement.prefill is not None:
            leg = PrefillLeg(self, placement.prefill, self._take(placement.prefill), self._proxy.legs, self.deadline_s)
            self._leg = leg
            leg.start(request.forwarded(placement.prefill.upstream.host_header, self._body))
            if self._leg is not leg:  # it failed at once, and another pair was taken
                return
        connection = placement.server.upstream.idle()
        if connection is not None:
            self._send(connection)
        else:
            self._connect(placement.server)

    def _take(self, server: Server) -> Ticket:
        figures = self._figures
        ticket = Ticket(server.load, figures.n_tokens, figures.is_stream)
        if self._proxy.logs_choices:
            load, role = server.load, server.record.role
            self._log().debug(
                "select worker (%s): %s, count: %d, tokens: %d", role, load.url, load.n_requests, load.n_tokens
            )
        return ticket

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
        connection.send(self._request.forwarded(self._server.upstream.host_header, self._body), self)

    # ---- the way back: of Receiver -------------------------------------------------------------------------------

    def on_head(self, head: AnswerHead, n_body_bytes: int | None) -> None:
        """The answer begins."""
        status = self._status = head.status
        if status in _REFUSALS and self._may_try_another(self._server):
            self._is_refused = True
            return
        self._is_events, is_1_0 = head.is_events, self._request.head.is_http_1_0
        has_body = status not in (204, 304)
        if n_body_bytes is not None or not has_body:
            framing = b"content-length: %d\r\n" % (n_body_bytes or 0) if has_body else b""
        elif is_1_0:
            framing, self._client.keep_alive = b"", False
        else:
            framing, self._is_chunked = b"transfer-encoding: chunked\r\n", True
        if not self._client.keep_alive:
            framing += b"connection: close\r\n"
        elif is_1_0:
            framing += b"connection: keep-alive\r\n"
        placement = self._placement
        if self._split is not None and placement is not None:
            framing += b"x-router-decode-url: %b\r\n" % placement.server.url.encode()
            if placement.prefill is not None:
                framing += b"x-router-prefill-url: %b\r\n" % placement.prefill.url.encode()
        self._head = head.written(framing, self._request.request_id)
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
        assert self._server is not None
        if self._is_refused:
            self._proxy.refused(self._server, self._status)
            self._again(self._server)
            return
        rest = self._held
        if self._split is not None and not self._is_sent and self._takes_up(self._split, rest):
            return
        if self._is_chunked:
            rest = (chunk(rest) if rest else b"") + LAST_CHUNK
        self._client.write(rest if self._is_sent else self._head + rest)
        self._is_sent = True
        self._server.n_failures = 0
        self._leg = None  # what is left of its answer is read without us
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
        self._proxy.failed(server, error)
        self._log().warning("%s: %s: %s", server.url, error.kind, error)
        self._after_failure(server, error)

    def _after_failure(self, server: Server, error: UpstreamError) -> None:
        if self._may_try_another(server):
            self._proxy.metrics.n_retries += 1
            self._again(server)
        else:
            self._drop_upstream()
            self._break(502, f"Failed to connect to backend service: {error}")

    def _again(self, server: Server | None) -> None:
        """Place the request once more, but not at `server`."""
        self._drop_upstream()
        self._release()
        self._n_retries += 1
        if server is not None:
            self._tried = [*self._tried, server.url]
        self._reset()
        self.start()

    def _takes_up(self, split: SplitBody, answer: bytes) -> bool:
        """Goes on elsewhere when decode had to give up half-way. True when it does."""
        pairs = self._proxy.pairs
        tokens = given_up(answer) if self._n_preempted < pairs.preempt_retry_count else None
        if tokens is None:
            return False
        self._n_preempted += 1
        self._proxy.metrics.n_preempted += 1
        if tokens:
            so_far = split.completion_token_ids
            split.completion_token_ids = tokens if tokens[: len(so_far)] == so_far else so_far + tokens
        others = pairs.preempt_retry_exclude_decode and self._server is not None
        self._again(self._server if others and self._may_try_another(self._server) else None)
        return True

    # ---- of the prefill half of a pair ---------------------------------------------------------------------------

    def prefill_failed(self, leg: PrefillLeg, error: UpstreamError) -> None:
        """Prefill gave no whole answer; once decode has begun, decode says what becomes of the request."""
        self._proxy.failed(leg.server, error)
        self._log().warning("prefill %s: %s: %s", leg.server.url, error.kind, error)
        if leg is self._leg:
            self._leg = None
            if not self._is_sent:
                self._after_failure(leg.server, error)

    def prefill_refused(self, leg: PrefillLeg, status: int, body: bytes) -> None:
        """Prefill answered with an error: a bad request is the client's, the rest is tried elsewhere."""
        self._log().warning("prefill %s: status %d", leg.server.url, status)
        if leg is not self._leg:
            return
        self._leg = None
        if self._is_sent:
            return
        if status >= 500 or status in _REFUSALS:
            self._proxy.refused(leg.server, status)
            self._after_failure(leg.server, UpstreamError("disconnected", f"prefill answered status {status}"))
            return
        self._drop_upstream()
        self._client.write(
            own_response(status, body, request_id=self._request.request_id, close=not self._client.keep_alive)
        )
        self._done(status)
        self._client.finish()

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

    def _may_try_another(self, failed: Server | None) -> bool:
        tried = [*self._tried, failed.url] if failed is not None else self._tried
        return not self._is_sent and len(tried) < MAX_ATTEMPTS and self._proxy.placer.can_place(tried)

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
        if self._leg is not None:
            leg, self._leg = self._leg, None
            leg.drop()

    def _release(self) -> None:
        if self._ticket is not None:
            self._ticket.end()
            self._ticket = None

    def _done(self, status: int) -> None:
        self._release()
        self._proxy.ended(self, self._request, self._placement, status)

    def _log(self) -> RequestLogger:
        return RequestLogger(LOGGER, self._request.request_id.decode("latin-1"))


def _end_of_events(data: bytes) -> int:
    """Where the last whole event of a piece of a stream ends; 0 when there is none."""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
