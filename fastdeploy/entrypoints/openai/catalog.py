"""Every endpoint as data: routes, /load, /openapi.json and /docs are made from this one table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fastdeploy.entrypoints.openai import experts, generate, responses, schema, service
from fastdeploy.entrypoints.openai.state import ServerState

Handler = Callable[[ServerState, Request], Awaitable[Response]]

_HELLO = {"role": "user", "content": "Say hello."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One path. `kind` is set for what generates, `handler` for the rest."""

    path: str
    summary: str
    methods: tuple[str, ...] = ("GET",)
    handler: Handler | None = None
    kind: generate.Kind | None = None
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    answer_type: str = "application/json"
    example: dict[str, Any] | None = None
    supported: bool = True


def _post(path: str, summary: str, **fields: Any) -> Endpoint:
    return Endpoint(path=path, summary=summary, methods=("POST",), **fields)


def _missing(path: str, what: str, *methods: str) -> Endpoint:
    return Endpoint(
        path=path,
        summary=f"Not supported: {what}.",
        methods=methods or ("POST",),
        handler=service.not_supported,
        supported=False,
    )


GENERATING = (
    _post(
        "/v1/chat/completions",
        "Answers a conversation.",
        kind=generate.CHAT,
        body=schema.ChatRequest,
        answer=responses.ChatCompletion,
        example={"messages": [_HELLO], "max_tokens": 32},
    ),
    _post(
        "/v1/completions",
        "Continues one or more prompts.",
        kind=generate.COMPLETIONS,
        body=schema.CompletionRequest,
        answer=responses.Completion,
        example={"prompt": "Once upon a time", "max_tokens": 32},
    ),
)

_TOKENIZE: dict[str, Any] = {
    "summary": "Token ids of a text or of a conversation.",
    "handler": service.tokenize,
    "body": schema.TokenizeRequest,
    "answer": responses.TokenizeAnswer,
    "example": {"prompt": "Hello", "return_token_strs": True},
}
_DETOKENIZE: dict[str, Any] = {
    "summary": "The text of token ids.",
    "handler": service.detokenize,
    "body": schema.DetokenizeRequest,
    "answer": responses.DetokenizeAnswer,
    "example": {"tokens": [1, 2, 3]},
}

SERVING = (
    Endpoint(path="/v1/models", summary="The model served.", handler=service.models, answer=responses.ModelList),
    _post("/tokenize", **_TOKENIZE),
    _post("/v1/tokenize", **_TOKENIZE),
    _post("/detokenize", **_DETOKENIZE),
    _post("/v1/detokenize", **_DETOKENIZE),
    _post(
        "/v1/abort_requests",
        "Ends running requests.",
        handler=service.abort_requests,
        body=schema.AbortRequest,
        answer=responses.AbortAnswer,
        example={"abort_all": True},
    ),
    _post(
        "/rearrange_experts",
        "With --enable-eplb: moves experts to where they should lie, before the next step.",
        handler=experts.rearrange,
        answer=responses.ExpertPlacesAnswer,
    ),
    _post(
        "/check_redundant",
        "With --enable-eplb: which experts lie where.",
        handler=experts.places,
        answer=responses.ExpertPlacesAnswer,
    ),
    _post(
        "/get_per_expert_tokens_stats",
        "With --enable-eplb: rows of each expert.",
        handler=experts.rows,
        answer=responses.ExpertRowsAnswer,
    ),
    Endpoint(
        path="/health", summary="200 while requests are served, 503 with the reason otherwise.", handler=service.health
    ),
    Endpoint(path="/ping", summary="The same as /health.", methods=("GET", "POST"), handler=service.health),
    Endpoint(path="/version", summary="The version of the server.", handler=service.version),
)

OBSERVING = (
    Endpoint(path="/metrics", summary="Metrics for Prometheus.", handler=service.metrics, answer_type="text/plain"),
    Endpoint(path="/config-info", summary="The configuration of the engine.", handler=service.config_info),
)

NOT_SUPPORTED = (
    _missing("/v1/embeddings", "this server generates text only"),
    _missing("/v1/reward", "this server generates text only"),
    _missing("/v1/pause", "the engine cannot be paused"),
    _missing("/v1/resume", "the engine cannot be paused"),
    _missing("/v1/is_paused", "the engine cannot be paused", "GET"),
    _missing("/v1/sleep", "weights and cache stay on the device"),
    _missing("/v1/wakeup", "weights and cache stay on the device"),
    _missing("/v1/update_weights", "restart the server to change weights"),
    _missing("/update_model_weight", "restart the server to change weights", "GET"),
    _missing("/clear_load_weight", "restart the server to change weights", "GET"),
    _missing("/controller/reset_scheduler", "there is no control server"),
    _missing("/controller/scheduler", "there is no control server"),
)
