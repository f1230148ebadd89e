"""Puts the server together: routes from the catalog, middleware around them. All state comes in as one argument."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fastdeploy.entrypoints.openai.body import UnknownFields
from fastdeploy.entrypoints.openai.catalog import GENERATING, NOT_SUPPORTED, OBSERVING, SERVING, Endpoint
from fastdeploy.entrypoints.openai.generate import GenerationEndpoint
from fastdeploy.entrypoints.openai.middleware import (
    ApiKeyMiddleware,
    ConcurrencyMiddleware,
    ErrorBoundaryMiddleware,
    RequestIdMiddleware,
)
from fastdeploy.entrypoints.openai.openapi import docs_page, openapi
from fastdeploy.entrypoints.openai.state import ServerState


def create_app(state: ServerState) -> Starlette:
    """The app of the main port."""
    own = [
        Endpoint(path="/load", summary="The routes under /v1.", handler=_load),
        Endpoint(path="/openapi.json", summary="This description.", handler=_openapi),
        Endpoint(path="/docs", summary="This description as a page.", handler=_docs, answer_type="text/html"),
    ]
    observing = OBSERVING if state.serves_metrics else ()
    return _app(state, [*GENERATING, *SERVING, *observing, *own, *NOT_SUPPORTED])


def create_metrics_app(state: ServerState) -> Starlette:
    """The app of --metrics-port."""
    return _app(state, OBSERVING)


def _app(state: ServerState, endpoints: Sequence[Endpoint]) -> Starlette:
    unknown = UnknownFields()
    app = Starlette(
        routes=[_route(endpoint, state, unknown) for endpoint in endpoints],
        middleware=[
            Middleware(RequestIdMiddleware, state.metrics, [endpoint.path for endpoint in endpoints]),
            Middleware(ErrorBoundaryMiddleware),
            Middleware(ApiKeyMiddleware, state.api_keys),
            Middleware(ConcurrencyMiddleware, state.slots, [e.path for e in endpoints if e.kind is not None]),
        ],
        exception_handlers={HTTPException: _raise},
    )
    app.router.redirect_slashes = False
    app.state.endpoints = tuple(endpoints)
    return app


def _route(endpoint: Endpoint, state: ServerState, unknown: UnknownFields) -> Route:
    if endpoint.kind is not None:
        generation = GenerationEndpoint(endpoint.kind, state, unknown)
        return Route(endpoint.path, generation, methods=list(endpoint.methods))
    if endpoint.handler is None:
        raise ValueError(f"{endpoint.path} has neither a handler nor a kind")
    return Route(endpoint.path, partial(endpoint.handler, state), methods=list(endpoint.methods), name=endpoint.path)


async def _raise(request: Request, exc: Exception) -> Response:
    """Hands HTTP errors of the framework on to the error boundary, which gives them OpenAI's body."""
    raise exc


async def _load(state: ServerState, request: Request) -> Response:
    routes = [
        {"path": e.path, "methods": list(e.methods), "tags": []}
        for e in request.app.state.endpoints
        if e.path.startswith("/v1") and e.supported
    ]
    return JSONResponse({"routes": routes})


async def _openapi(state: ServerState, request: Request) -> Response:
    description = openapi(request.app.state.endpoints, bool(state.api_keys))
    return Response(msgspec.json.encode(description), media_type="application/json")


async def _docs(state: ServerState, request: Request) -> Response:
    base_url = f"{request.url.scheme}://{request.url.netloc}"
    page = docs_page(request.app.state.endpoints, state.config.model.served_name, base_url, bool(state.api_keys))
    return HTMLResponse(page)
