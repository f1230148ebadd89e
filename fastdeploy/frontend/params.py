"""Whether a model can honour sampling parameters: types, limits that bound the work, words that become token ids."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import InvalidRequest
from fastdeploy.sampling_params import ParamTypeError, SamplingParams

if TYPE_CHECKING:
    from fastdeploy.frontend.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_BAD_WORDS = 256


def checked_params(params: SamplingParams, config: EngineConfig, tokenizer: Tokenizer) -> SamplingParams:
    """`params` with the ids of their bad words. Raises ParamTypeError or InvalidRequest naming the field and limit."""
    _check_types(params)
    _check_supported(params)
    _check_stops(params)
    _check_logprobs(params, config)
    _check_ids(params, config.model.shape.vocab_size)
    if not params.bad_words:
        return params
    banned = single_token_ids(tokenizer, params.bad_words) + (params.bad_words_token_ids or [])
    return msgspec.structs.replace(params, bad_words=None, bad_words_token_ids=banned)


def single_token_ids(tokenizer: Tokenizer, words: Iterable[str]) -> list[int]:
    """Token ids of the words that are one token, at the start of a text or after a space; others are skipped."""
    found: set[int] = set()
    for word in words:
        spellings = (tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}"))
        ids = {spelling[0] for spelling in spellings if len(spelling) == 1}
        if not ids:
            LOGGER.warning("bad_words: %.50r is more than one token and is skipped", word)
        found |= ids
    return sorted(found)


def _check_types(params: SamplingParams) -> None:
    """The engine core refuses to decode a field of another type, and would die of it."""
    try:
        msgspec.convert(msgspec.to_builtins(params), SamplingParams)
    except (msgspec.ValidationError, TypeError) as error:
        what, _, path = str(error).replace("`", "").partition(" - at $.")
        raise ParamTypeError(f"sampling_params: {path or 'a field'}: {what}", path or None) from None


def _check_supported(params: SamplingParams) -> None:
    for name in ("guided_decoding", "reasoning_max_tokens"):
        if getattr(params, name) is not None:
            raise InvalidRequest(f"{name} is not supported yet", name)
    if params.best_of not in (None, params.n):
        raise InvalidRequest(f"best_of above n ({params.n}) is not supported here, got {params.best_of}", "best_of")
    strangers = sorted((params.logits_processors_args or {}).keys() - {"logit_bias"})
    if strangers:
        raise InvalidRequest(
            f"logits_processors_args: {strangers[0]!r} is not supported yet; only 'logit_bias' is",
            "logits_processors_args",
        )


def _check_stops(params: SamplingParams) -> None:
    """Stop strings become an automaton, bad words are tokenised: both cost what their number and length are."""
    for name, words, limit in (
        ("stop", params.stop_strings, MAX_STOP_STRINGS),
        ("bad_words", params.bad_words or (), MAX_BAD_WORDS),
    ):
        if len(words) > limit:
            raise InvalidRequest(f"{name} must have at most {limit} entries, got {len(words)}", name)
        longest = max(map(len, words), default=0)
        if longest > MAX_STOP_CHARS:
            raise InvalidRequest(f"{name}: an entry may have {MAX_STOP_CHARS} characters, got one of {longest}", name)


def _check_logprobs(params: SamplingParams, config: EngineConfig) -> None:
    if config.model.synthetic is not None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) is not None:
                raise InvalidRequest(f"{name}: a synthetic server computes no probabilities; leave it out", name)
    allowed = config.logprobs.max_logprobs
    if allowed < 0:
        return
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and not 0 <= value <= allowed:
            raise InvalidRequest(f"{name} must be at most {allowed} (--max-logprobs), got {value}", name)


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    bias = params.logit_bias
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("bad_words_token_ids", params.bad_words_token_ids),
        ("logit_bias", bias),
    ):
        for token_id in ids or ():
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"{name}: token id {token_id} is outside the vocabulary [0, {vocab_size - 1}]", name
                )
    if not all(map(math.isfinite, bias.values())):
        raise InvalidRequest("logit_bias: values must be finite", "logit_bias")
