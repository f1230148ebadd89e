"""How tokens of one request are chosen: the user's `SamplingParams`, checked in one place.

The same frozen struct travels from the user to the engine core and the sampler. `None` means "not said";
`resolved()` fills such fields, so that nothing behind the front end sees a `None` number.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from fastdeploy.errors import InvalidRequest

MAX_SEED = 922337203685477580


class ParamTypeError(InvalidRequest, TypeError):
    """A sampling parameter has the wrong type."""


class ParamValueError(InvalidRequest):
    """A sampling parameter is out of its range."""


class GuidedDecodingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the output must conform to; at most one field is set."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        named = [f for f in self.__struct_fields__ if getattr(self, f) is not None]
        if len(named) > 1:
            raise ParamValueError(f"guided_decoding: only one of {', '.join(named)} may be set", "guided_decoding")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request.

    Raises `ParamValueError` (a `ValueError`) or `ParamTypeError` (a `TypeError`) naming the field and its limit.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_seqs_len: list[int] | None = None
    max_tokens: int | None = None
    reasoning_max_tokens: int | None = None
    min_tokens: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    temp_scaled_logprobs: bool = False
    top_p_normalized_logprobs: bool = False
    bad_words: list[str] | None = None
    bad_words_token_ids: list[int] | None = None
    guided_decoding: GuidedDecodingParams | None = None
    logits_processors_args: dict[str, Any] | None = None
    # Beyond the original: what benchmarks and users of other engines expect.
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        check = self._check
        check("n", self.n >= 1, "must be at least 1")
        check("best_of", self.best_of is None or self.best_of >= self.n, f"must be at least n ({self.n})")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(name, value is None or -2 <= value <= 2, "must be in [-2, 2]")
        check("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "must be above 0")
        check("temperature", self.temperature is None or self.temperature >= 0, "must be at least 0")
        check("top_p", self.top_p is None or 0 <= self.top_p <= 1, "must be in [0, 1]")
        check("top_k", self.top_k >= -1, "must be at least -1 (-1 and 0 switch it off)")
        check("min_p", 0 <= self.min_p <= 1, "must be in [0, 1]")
        check("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"must be in [0, {MAX_SEED}]")
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be at least 1")
        check("min_tokens", self.min_tokens >= 0, "must be at least 0")
        if self.max_tokens is not None:
            limit = f"must be at most max_tokens ({self.max_tokens})"
            check("min_tokens", self.min_tokens <= self.max_tokens, limit)
            check("reasoning_max_tokens", (self.reasoning_max_tokens or 0) <= self.max_tokens, limit)
        check("logprobs", self.logprobs is None or self.logprobs >= -1, "must be at least -1")
        check("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= -1, "must be at least -1")
        check("stop", "" not in self.stop_strings, "must not contain an empty string")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ParamValueError(f"{name} {rule}, got {getattr(self, name)}", name)

    def _check_types(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            if type(getattr(self, name)) is not int:
                raise ParamTypeError(f"{name} must be an integer, got {getattr(self, name)!r}", name)
        for name in ("best_of", "seed", "max_tokens", "reasoning_max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ParamTypeError(f"{name} must be an integer or None, got {value!r}", name)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ParamTypeError(f"{name} must be a number, got {value!r}", name)
            if value is not None and not -1e30 < value < 1e30:
                raise ParamValueError(f"{name} must be finite, got {value!r}", name)
        _ = self.logit_bias

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def logit_bias(self) -> dict[int, float]:
        """`logits_processors_args["logit_bias"]` as {token id: added to its logit}."""
        bias = (self.logits_processors_args or {}).get("logit_bias") or {}
        try:
            return {int(token): float(value) for token, value in bias.items()}
        except (AttributeError, TypeError, ValueError):
            raise ParamTypeError(
                f"logits_processors_args: logit_bias must map token ids to numbers, got {bias!r}", "logit_bias"
            ) from None

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def resolved(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        """A copy without unset numbers.

        `defaults` are the model's own (generation_config.json); `max_tokens` holds when the request names none.
        """
        filled: dict[str, Any] = {
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_p": 1.0,
            **{k: v for k, v in defaults.items() if k in self.__struct_fields__},
            "seed": secrets.randbelow(MAX_SEED + 1),
            "max_tokens": max(max_tokens, self.min_tokens, 1),
        }
        changes = {name: value for name, value in filled.items() if getattr(self, name) is None}
        if self.top_k == 0 and "top_k" in defaults:
            changes["top_k"] = int(defaults["top_k"])
        return msgspec.structs.replace(self, **changes)
