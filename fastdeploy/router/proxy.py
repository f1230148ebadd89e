"""The forwarding side of the router: what requests share, and what is told about servers that fail them."""

from __future__ import annotations

import logging

from fastdeploy.errors import InvalidRequest
from fastdeploy.router.downstream import ClientConnection, Work
from fastdeploy.router.exchange import Exchange
from fastdeploy.router.health import HealthChecker
from fastdeploy.router.http1 import Request, error_body, own_response
from fastdeploy.router.metrics import RouterMetrics
from fastdeploy.router.placement import PairSettings, Placement, Placer, SplitBody
from fastdeploy.router.prefill_leg import PrefillLeg
from fastdeploy.router.prompt_text import PromptReader
from fastdeploy.router.registry import Server
from fastdeploy.router.upstream import UpstreamError

LOGGER = logging.getLogger(__name__)
MAX_IN_FLIGHT = 16384  # requests; each holds its body. One more is answered 429


class Proxy:
    """Forwards requests. `closing` is set once, to why none is taken any more."""

    def __init__(
        self, placer: Placer, pairs: PairSettings, checker: HealthChecker, metrics: RouterMetrics, timeout_s: float
    ) -> None:
        """`timeout_s`: the longest that one request may take, from its last byte to the last of its answer."""
        self.placer, self.pairs, self.metrics, self.timeout_s = placer, pairs, metrics, timeout_s
        self.legs: set[PrefillLeg] = set()
        self.closing: str | None = None
        self.logs_choices = LOGGER.isEnabledFor(logging.DEBUG)
        self._checker = checker
        self._reader = PromptReader(placer.wants_text)
        self._exchanges: set[Exchange] = set()

    @property
    def n_in_flight(self) -> int:
        """Requests that are being answered."""
        return len(self._exchanges)

    def forward(self, request: Request, client: ClientConnection) -> Work | None:
        """Begin to forward a request."""
        status, reason = 503, self.closing
        if reason is None and len(self._exchanges) >= MAX_IN_FLIGHT:
            status, reason = 429, f"Too many requests, the router holds {MAX_IN_FLIGHT}; retry later"
        if reason is not None:
            self._refuse(request, client, status, reason)
            return None
        try:
            split = SplitBody(request.body, request.request_id.decode("latin-1")) if self.placer.is_split else None
        except InvalidRequest as exc:
            self._refuse(request, client, exc.status, str(exc))
            return None
        exchange = Exchange(self, request, client, self._reader.read(request.body), split)
        self._exchanges.add(exchange)
        self.metrics.n_in_flight += 1
        exchange.start()
        return exchange

    def _refuse(self, request: Request, client: ClientConnection, status: int, reason: str) -> None:
        body = error_body(status, reason)
        client.write(own_response(status, body, request_id=request.request_id, close=not client.keep_alive))
        self.metrics.http(request.head.method, request.head.path, status, self._checker.now_s() - request.received_s)
        client.finish()

    def expire(self, now_s: float) -> None:
        """End the requests whose time is up."""
        for exchange in [one for one in self._exchanges if one.deadline_s < now_s]:
            exchange.expire()
        for leg in [one for one in self.legs if one.deadline_s < now_s]:
            leg.drop()

    def stop(self, reason: str) -> None:
        """End all requests."""
        for exchange in list(self._exchanges):
            exchange.stop(reason)
        for leg in list(self.legs):
            leg.drop()

    # ---- of Exchange ---------------------------------------------------------------------------------------------

    def failed(self, server: Server, error: UpstreamError) -> None:
        """The server gave no whole answer."""
        self.metrics.failure(server.url, error.kind)
        self._checker.suspect(server, f"{error.kind}: {error}")

    def refused(self, server: Server, status: int) -> None:
        """The server did not take the request; with 503 it may be on its way down."""
        self.metrics.n_retries += 1
        self.metrics.failure(server.url, str(status))
        if status == 503:
            self._checker.look_at(server)

    def ended(self, exchange: Exchange, request: Request, placement: Placement | None, status: int) -> None:
        """The request is over, in whatever way."""
        self._exchanges.discard(exchange)
        self.metrics.n_in_flight -= 1
        url = placement.server.url if placement is not None else ""
        if self.placer.is_split:
            prefill = placement.prefill.url if placement is not None and placement.prefill is not None else ""
            self.metrics.inference("", prefill, url, status)
        else:
            self.metrics.inference(url, "", "", status)
        self.metrics.http(request.head.method, request.head.path, status, self._checker.now_s() - request.received_s)
