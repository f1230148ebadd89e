"""Errors as HTTP answers: the one place that turns an exception into a status and OpenAI's error body."""

from __future__ import annotations

import logging

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastdeploy.entrypoints.openai.responses import ErrorBody, ErrorInfo
from fastdeploy.errors import EngineError, FastDeployError, RequestError
from fastdeploy.observability.logs import RequestLogger

LOGGER = logging.getLogger(__name__)

_HTTP_TEXT = {
    404: "there is nothing at {path}; GET /openapi.json lists the paths",
    405: "{path} does not answer {method}; GET /openapi.json lists the methods",
}


def error_info(exc: BaseException) -> tuple[int, ErrorInfo]:
    """The HTTP status and the error fields of an exception; what is not ours gets a text that gives nothing away."""
    if isinstance(exc, RequestError):
        return exc.status, ErrorInfo(exc.message, exc.kind, exc.param, exc.code)
    if isinstance(exc, EngineError):
        return 503, ErrorInfo(str(exc), "server_error", None, "engine_unavailable")
    if isinstance(exc, HTTPException):
        return exc.status_code, ErrorInfo(exc.detail, "invalid_request_error", None, "invalid_value")
    return 500, ErrorInfo("internal error; the server's log tells more under this x-request-id", *_INTERNAL)


_INTERNAL = ("internal_error", None, "internal_error")


def error_response(exc: Exception, path: str, method: str, request_id: str) -> Response:
    """The answer for an exception raised while handling `method` `path`; those with status 500 are logged."""
    status, info = error_info(exc)
    if isinstance(exc, HTTPException):
        info.message = _HTTP_TEXT.get(status, info.message).format(path=path, method=method)
    if status == 500:
        log_failure(exc, request_id)
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    if status in (429, 503):
        headers["retry-after"] = "1"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(ErrorBody(info), status, headers)


def log_failure(exc: Exception, request_id: str) -> None:
    """One line for an error that we raised, the traceback of one that we did not expect."""
    ours = isinstance(exc, FastDeployError)
    RequestLogger(LOGGER, request_id).error("the request failed: %s", exc, exc_info=None if ours else exc)


def json_response(body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A struct as a JSON answer."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
