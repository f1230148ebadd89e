"""What is told of many durations: mean, percentiles, and how many requests kept their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdeploy.errors import ConfigError

PERCENTS = (50, 90, 95, 99)
LIMITED = ("ttft", "tpot", "e2e")

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one request in seconds; `tpot_s` is None for an answer of one token."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float

    def of(self, name: str) -> float | None:
        """By its short name: ttft, tpot or e2e."""
        value: float | None = getattr(self, f"{name}_s")
        return value


def summary_ms(values_s: Values) -> dict[str, float] | None:
    """Count, mean, least, percentiles (linear between the closest ranks) and largest, in ms; None without values."""
    if len(values_s) == 0:
        return None
    values_ms = np.asarray(values_s) * 1000
    percentiles = np.percentile(values_ms, PERCENTS)
    return {
        "n": len(values_ms),
        "mean": float(values_ms.mean()),
        "min": float(values_ms.min()),
        **{f"p{percent}": float(value) for percent, value in zip(PERCENTS, percentiles, strict=True)},
        "max": float(values_ms.max()),
    }


def summaries_ms(timings: Sequence[Timing]) -> dict[str, dict[str, float] | None]:
    """`summary_ms` of each duration."""
    values = {name: [one.of(name) for one in timings] for name in LIMITED}
    return {f"{name}_ms": summary_ms([v for v in found if v is not None]) for name, found in values.items()}


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` as {"ttft": 0.5, "tpot": 0.05} in seconds. Raises ConfigError."""
    limits = {}
    for word in words:
        name, colon, written = word.partition(":")
        try:
            limit_ms = float(written)
        except ValueError:
            limit_ms = -1.0
        if name not in LIMITED or not colon or not limit_ms > 0:
            raise ConfigError(f"--goodput {word}: expected NAME:MS with a NAME of {', '.join(LIMITED)}, e.g. ttft:500")
        limits[name] = limit_ms / 1000
    return limits


def n_within(timings: Sequence[Timing], limits_s: Mapping[str, float]) -> int:
    """Requests that keep all limits; a duration that a request does not have keeps every limit."""
    return sum(
        all((value := one.of(name)) is None or value <= limit for name, limit in limits_s.items()) for one in timings
    )


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second in buckets of equal width, from the start on."""

    bucket_s: float
    tokens_per_s: list[float]


MAX_BUCKETS = 300


def rate_over_time(times_s: Values, n_tokens: Values, duration_s: float) -> Rate:
    """`n_tokens[i]` tokens came at `times_s[i]`; buckets of a second, wider for long runs, narrower for short ones."""
    wanted_s = min(1.0, duration_s / 20) if duration_s < 20 else float(np.ceil(duration_s / MAX_BUCKETS))
    n_buckets = max(int(np.ceil(duration_s / max(wanted_s, 1e-9))), 1)
    bucket_s = max(duration_s / n_buckets, 1e-9)
    index = np.clip((np.asarray(times_s) / bucket_s).astype(int), 0, n_buckets - 1)
    found = np.bincount(index, weights=np.asarray(n_tokens, dtype=float), minlength=n_buckets) / bucket_s
    return Rate(round(bucket_s, 6), [round(float(value), 3) for value in found])
