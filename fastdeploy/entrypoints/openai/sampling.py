"""From the fields of a request to `SamplingParams`, with the limits that bound the work of one request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from fastdeploy.config.schema import EngineConfig
from fastdeploy.entrypoints.openai.schema import (
    MAX_BIASED_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from fastdeploy.errors import InvalidRequest, ModelNotFound
from fastdeploy.frontend.params import single_token_ids
from fastdeploy.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastdeploy.frontend.tokenizer import Tokenizer

MAX_ANSWERS = 1024  # prompts x choices of one HTTP request

# Request fields that mean the same in SamplingParams.
_SAME = (
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "temp_scaled_logprobs",
    "top_p_normalized_logprobs",
)


def refuse_unsupported(request: GenerationRequest) -> None:
    """Raises `InvalidRequest` naming the first field that would change the answer and cannot be honoured."""
    for name in request.UNSUPPORTED:
        if getattr(request, name) not in (None, False):
            raise InvalidRequest(f"{name} is not supported yet; leave it out", name)
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        raise InvalidRequest(
            f"response_format of type {kind!r} is not supported yet; only 'text' is", "response_format"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream=true", "stream_options")


def check_model(requested: str | None, config: EngineConfig, verify: bool) -> None:
    """Raises `ModelNotFound` when model names are verified and this one is another."""
    served = config.model.served_name
    if verify and requested not in (None, served, "default"):
        raise ModelNotFound(f"model {requested!r} is not served here; this server has {served!r}", "model")


def chat_params(request: ChatRequest, config: EngineConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Sampling parameters of a chat request. Raises `InvalidRequest` naming the field and its limit."""
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
    n_top = (request.top_logprobs or 0) if request.logprobs else None
    _check_logprobs(n_top, "top_logprobs", config)
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    if max_tokens == 0:
        raise InvalidRequest("max_tokens must be at least 1, got 0", "max_tokens")
    return _params(request, config, tokenizer, max_tokens=max_tokens, logprobs=n_top)


def completion_params(request: CompletionRequest, config: EngineConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Sampling parameters of a completions request; `n` is `best_of` where that is larger.

    With `echo`, `max_tokens` 0 asks for one token, which `completions.py` drops. Raises `InvalidRequest`.
    """
    _check_logprobs(request.logprobs, "logprobs", config)
    max_tokens, min_tokens = request.max_tokens, request.min_tokens
    if max_tokens == 0:
        if not request.echo:
            raise InvalidRequest("max_tokens must be at least 1 without echo, got 0", "max_tokens")
        max_tokens, min_tokens = 1, 0
    n, best_of = request.n or 1, request.best_of
    n_wanted = n
    logprobs = request.logprobs
    if best_of is not None and best_of != n:
        if best_of < n:
            raise InvalidRequest(f"best_of must be at least n ({n}), got {best_of}", "best_of")
        if request.stream:
            raise InvalidRequest("best_of above n cannot be streamed: which choice is best shows at the end", "best_of")
        n_wanted = best_of
        logprobs = logprobs or 0  # the choices are ranked by their tokens' log-probabilities
    extra: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs, "n": n_wanted}
    if min_tokens is not None:
        extra["min_tokens"] = min_tokens
    if request.echo and request.logprobs is not None:
        extra["prompt_logprobs"] = request.logprobs
    return _params(request, config, tokenizer, **extra)


def check_n_answers(n_prompts: int, n_choices: int) -> None:
    """Raises `InvalidRequest` when one request would become too many."""
    if n_prompts * n_choices > MAX_ANSWERS:
        raise InvalidRequest(
            f"{n_prompts} prompts with {n_choices} choices each exceed the limit of {MAX_ANSWERS} answers a request",
            "n",
        )


def _params(request: GenerationRequest, config: EngineConfig, tokenizer: Tokenizer, **extra: Any) -> SamplingParams:
    """Raises `InvalidRequest`."""
    fields: dict[str, Any] = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    banned = list(request.bad_words_token_ids or [])
    if request.bad_words:
        banned += single_token_ids(tokenizer, request.bad_words)
    if banned:
        fields["bad_words_token_ids"] = banned
    bias = _logit_bias(request)
    if bias:
        fields["logits_processors_args"] = {"logit_bias": bias}
    fields["n"] = request.n or 1
    fields.update(extra)
    vocab_size = config.model.shape.vocab_size
    for name in ("stop_token_ids", "bad_words_token_ids"):
        check_token_ids(fields.get(name) or [], vocab_size, name)
    check_token_ids((int(token) for token in bias), vocab_size, "logit_bias")
    max_tokens = fields.get("max_tokens")
    if "min_tokens" not in fields and max_tokens is not None:
        fields["min_tokens"] = min(SamplingParams().min_tokens, max_tokens)
    return SamplingParams(**fields)


def check_token_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises `InvalidRequest` when an id is not one of the model's."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param}: token id {token_id} is outside the vocabulary [0, {vocab_size - 1}]", param)


def _logit_bias(request: GenerationRequest) -> dict[str, float]:
    """OpenAI's `logit_bias` over the one of `logits_processors_args`, which must hold nothing else."""
    arguments = request.logits_processors_args or {}
    strangers = sorted(arguments.keys() - {"logit_bias"})
    if strangers:
        raise InvalidRequest(
            f"logits_processors_args: {strangers[0]!r} is not supported yet; only 'logit_bias' is",
            "logits_processors_args",
        )
    bias = {**(arguments.get("logit_bias") or {}), **(request.logit_bias or {})}
    if len(bias) > MAX_BIASED_TOKENS:
        raise InvalidRequest(f"logit_bias has {len(bias)} entries; the limit is {MAX_BIASED_TOKENS}", "logit_bias")
    try:
        numbers = msgspec.convert(bias, dict[int, float], strict=False)
    except msgspec.ValidationError:
        raise InvalidRequest("logit_bias must map token ids to numbers", "logit_bias") from None
    if any(not -100 <= value <= 100 for value in numbers.values()):
        raise InvalidRequest("logit_bias: values must be in [-100, 100]", "logit_bias")
    return {str(token): value for token, value in numbers.items()}


def _check_logprobs(n_top: int | None, param: str, config: EngineConfig) -> None:
    limit = config.logprobs.max_logprobs
    limit = config.model.shape.vocab_size if limit < 0 else limit
    if n_top is not None and n_top > limit:
        raise InvalidRequest(f"{param} must be at most {limit} (--max-logprobs), got {n_top}", param)
