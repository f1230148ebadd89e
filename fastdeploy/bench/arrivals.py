"""When requests come in an open loop: a renewal process with gamma-distributed gaps."""

from __future__ import annotations

import numpy as np


def arrival_times_s(n_requests: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Ascending times from 0 on, `rate` a second on average. `burstiness` is the gamma distribution's shape.

    With 1 the gaps are exponential, which is a Poisson process; below 1 requests come in bursts, above 1 evenly.
    """
    gaps_s = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), size=max(n_requests - 1, 0))
    times_s: list[float] = np.concatenate([[0.0], np.cumsum(gaps_s)])[:n_requests].tolist()
    return times_s
