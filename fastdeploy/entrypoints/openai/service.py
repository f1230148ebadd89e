"""The endpoints that do not generate: health, models, tokens, abort, metrics, configuration."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import fastdeploy
from fastdeploy.entrypoints.openai.body import UnknownFields, parse_object, read_body, to_struct
from fastdeploy.entrypoints.openai.error_response import json_response
from fastdeploy.entrypoints.openai.prompts import encode, render_chat
from fastdeploy.entrypoints.openai.responses import (
    AbortAnswer,
    AbortedRequest,
    AbortResult,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    ModelPermission,
    TokenizeAnswer,
)
from fastdeploy.entrypoints.openai.sampling import check_model, check_token_ids
from fastdeploy.entrypoints.openai.schema import AbortRequest, DetokenizeRequest, TokenizeRequest
from fastdeploy.entrypoints.openai.state import ServerState
from fastdeploy.errors import EngineUnavailable, InvalidRequest, RequestError
from fastdeploy.observability.metrics import CONTENT_TYPE

StructT = TypeVar("StructT", bound=msgspec.Struct)

_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_HIDDEN = "(hidden)"
SYNTHETIC_ROOT = "synthetic: there is no model, answers are made up"


class NotSupported(RequestError):
    """The original has this endpoint, this server does not."""

    status = 501
    code = "not_supported"


async def _body(request: Request, kind: type[StructT]) -> StructT:
    return to_struct(parse_object(await read_body(request)), kind, UnknownFields())


async def health(state: ServerState, request: Request) -> Response:
    """200 while requests are served, else 503 with the reason as JSON. The body of 200 is empty, or tells of Redis.

    The original answers 404 or 304 when it is not well; balancers and Kubernetes understand 503, so that is used.
    Raises `EngineUnavailable`.
    """
    reason = state.health()
    if reason is not None:
        raise EngineUnavailable(reason)
    note = {} if state.generator is None else state.generator.note()
    return JSONResponse({"status": "ok", **note}) if note else Response()


async def version(state: ServerState, request: Request) -> Response:
    """The version of this software."""
    return JSONResponse({"version": fastdeploy.__version__})


async def models(state: ServerState, request: Request) -> Response:
    """The one model served."""
    model, created_s = state.config.model, state.started_s
    permission = ModelPermission(f"modelperm-{uuid.uuid4().hex}", created_s)
    root = model.path if model.synthetic is None else SYNTHETIC_ROOT
    card = ModelCard(model.served_name, created_s, root, model.max_model_len, [permission])
    return json_response(ModelList([card]))


async def tokenize(state: ServerState, request: Request) -> Response:
    """Token ids of a text or of a rendered conversation. Raises `InvalidRequest`."""
    body = await _body(request, TokenizeRequest)
    check_model(body.model, state.config, state.verify_model)
    tokenizer = state.engine().tokenizer
    text, add_special = body.prompt, body.add_special_tokens is not False
    if (text is None) == (body.messages is None):
        raise InvalidRequest("exactly one of prompt and messages is needed", "prompt")
    if text is None:
        wants_prompt = body.add_generation_prompt is not False
        text = await render_chat(
            body.messages or [], state, body.chat_template_kwargs, add_generation_prompt=wants_prompt
        )
        add_special = bool(body.add_special_tokens)
    max_model_len = state.config.model.max_model_len
    ids = await encode(tokenizer, text, add_special, max_model_len)
    texts = [tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return json_response(TokenizeAnswer(len(ids), max_model_len, ids, texts))


async def detokenize(state: ServerState, request: Request) -> Response:
    """The text of token ids, special tokens included. Raises `InvalidRequest`."""
    body = await _body(request, DetokenizeRequest)
    check_model(body.model, state.config, state.verify_model)
    tokenizer = state.engine().tokenizer
    check_token_ids(body.tokens, state.config.model.shape.vocab_size, "tokens")
    return json_response(DetokenizeAnswer(tokenizer.decode(body.tokens, skip_special_tokens=False)))


async def abort_requests(state: ServerState, request: Request) -> Response:
    """Ends requests at once; each answers its own client with finish reason "abort"."""
    body = await _body(request, AbortRequest)
    if not body.abort_all and not body.req_ids:
        raise InvalidRequest("must provide abort_all=true or req_ids", "req_ids")
    named = state.live.ids() if body.abort_all else (body.req_ids or [])
    aborted, missing = state.abort(named)
    result = AbortResult([AbortedRequest(request_id, n) for request_id, n in aborted], missing)
    return json_response(AbortAnswer(f"control-{uuid.uuid4()}", result))


async def metrics(state: ServerState, request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    return Response(state.metrics.render(), media_type=None, headers={"content-type": CONTENT_TYPE})


async def config_info(state: ServerState, request: Request) -> Response:
    """The engine's configuration, and the environment variables that may have shaped it."""
    info: dict[str, Any] = msgspec.to_builtins(state.config)
    return Response(
        msgspec.json.encode({**info, "env_config": shown_environment(state)}), media_type="application/json"
    )


def shown_environment(state: ServerState) -> dict[str, str]:
    """Only FD_* and CUDA_VISIBLE_DEVICES: the rest of an environment is full of other programs' passwords and tokens,
    and this path asks for no API key. Of ours, those whose name tells of a secret are hidden."""
    shown = {k: v for k, v in state.environment.items() if k.startswith("FD_") or k == "CUDA_VISIBLE_DEVICES"}
    return {k: _HIDDEN if any(word in k for word in _SECRET_WORDS) else v for k, v in sorted(shown.items())}


async def not_supported(state: ServerState, request: Request) -> Response:
    """Says that this server lacks an endpoint of the original. Raises `NotSupported`."""
    raise NotSupported(
        f"{request.method} {request.url.path} is not supported by this server; GET /openapi.json lists what is"
    )
