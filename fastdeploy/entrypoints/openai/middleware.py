"""What happens around every request, outermost first: request id, error boundary, API keys, concurrency limit."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdeploy.entrypoints.openai.error_response import error_response
from fastdeploy.entrypoints.openai.state import Slots
from fastdeploy.errors import Unauthorized
from fastdeploy.observability.logs import RequestLogger
from fastdeploy.observability.metrics import Metrics

LOGGER = logging.getLogger(__name__)
REQUEST_ID_KEY = "fastdeploy.request_id"  # scope entries
CLIENT_ID_KEY = "fastdeploy.client_request_id"
MAX_ID_CHARS = 128
CLIENT_GONE = 499  # the usual figure in logs for a client that left before the answer began
PROBED_PATHS = frozenset({"/health", "/ping", "/metrics"})  # every second: logged at debug level
SELF_LOGGED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})  # log more about themselves when they end

_NOT_ID = re.compile(r"[^A-Za-z0-9._:\-]")


class RequestIdMiddleware:
    """Gives every request an id (the client's `x-request-id`, or a new one) and echoes it; counts and logs answers."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self.app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _NOT_ID.sub("", Headers(scope=scope).get("x-request-id", ""))[:MAX_ID_CHARS]
        request_id = given or uuid.uuid4().hex
        scope[REQUEST_ID_KEY] = request_id
        scope[CLIENT_ID_KEY] = given or None
        status = 0
        began_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._note(scope, status or CLIENT_GONE, time.perf_counter() - began_s)

    def _note(self, scope: Scope, status: int, took_s: float) -> None:
        path, method = scope["path"], scope["method"]
        self._metrics.http_request(method, path if path in self._paths else "other", status)
        is_quiet = path in PROBED_PATHS or (path in SELF_LOGGED_PATHS and status < 400)
        level = logging.DEBUG if is_quiet else logging.INFO
        if LOGGER.isEnabledFor(level):  # quoted: no control characters of a client's in the log
            logger = RequestLogger(LOGGER, scope[REQUEST_ID_KEY])
            logger.log(level, "%s %s status=%d took_s=%.4f", method, quote(path), status, took_s)


class ErrorBoundaryMiddleware:
    """Turns whatever a handler or an inner middleware raises into OpenAI's error body; the server goes on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as exc:
            if started:  # too late for a status: a cut connection tells the client that the answer is incomplete
                raise
            response = error_response(exc, scope["path"], scope["method"], scope[REQUEST_ID_KEY])
            await response(scope, receive, send)


_GUARDED = ("/v1", "/rearrange_experts")  # what computes, or stops others for a while


class ApiKeyMiddleware:
    """Asks for `Authorization: Bearer KEY` on `_GUARDED` paths when the server has keys; OPTIONS is free."""

    def __init__(self, app: ASGIApp, api_keys: Collection[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and self._digests
            and scope["path"].startswith(_GUARDED)
            and scope["method"] != "OPTIONS"
        ):
            self._check(Headers(scope=scope).get("authorization", ""))
        await self.app(scope, receive, send)

    def _check(self, header: str) -> None:
        """Compares digests of equal length with every key, so that time tells nothing. Raises `Unauthorized`."""
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()  # headers are decoded as that
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            what = "wrong" if header else "missing"
            raise Unauthorized(f"the API key is {what}; send it as 'Authorization: Bearer KEY'")


class ConcurrencyMiddleware:
    """Holds a slot for each generation request until its last byte; raises `Overloaded` (429) when there is none."""

    def __init__(self, app: ASGIApp, slots: Slots, paths: Collection[str]) -> None:
        self.app = app
        self._slots = slots
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self._slots.take()
        try:
            await self.app(scope, receive, send)
        finally:
            self._slots.give_back()
