"""Which server gets a request: a choice over loads, without sockets or clocks.

| policy | chooses |
| --- | --- |
| random | any |
| round_robin | one after the other |
| power_of_two | of two at random, the one with fewer requests |
| process_tokens | the fewest tokens in flight |
| request_num | the fewest requests in flight |
| fd_metrics_score | the smallest running + waiting * waiting-weight, counted by the router |
| fd_remote_metrics_score | the same with what the servers say about themselves |
| cache_aware | the prefix cache's best hit, weighed against the load; process_tokens when loads are far apart |
| remote_cache_aware | the same with what the servers say about themselves |

The remote policies use figures that were asked for in the background, plus what the router sent since; for a server
without fresh figures they use the router's own counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import msgspec

from fastdeploy.errors import ConfigError
from fastdeploy.router.ledger import ServerLoad
from fastdeploy.router.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """The section `scheduler` of the configuration file."""

    policy: str = "request_num"
    prefill_policy: str = "process_tokens"
    decode_policy: str = "request_num"
    eviction_interval_secs: float = 60
    eviction_duration_mins: float = 30
    cache_block_size: int = 64
    balance_abs_threshold: float = 1
    balance_rel_threshold: float = 0.2
    hit_ratio_weight: float = 1
    load_balance_weight: float = 1
    waiting_weight: float = 1
    tokenizer_url: str = ""
    tokenizer_timeout_secs: float = 2
    stats_interval_secs: float = 5


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What a policy may know about a request; `text` is empty unless the policy `needs_text`."""

    n_tokens: int
    text: str
    now_s: float


class Policy(Protocol):
    """One way to choose. `needs_text` and `needs_remote` say what must be collected for it."""

    needs_text: bool
    needs_remote: bool

    def pick(self, loads: Sequence[ServerLoad], ask: Ask) -> int:
        """Index of the chosen one; `loads` is not empty and sorted by URL."""

    def tidy(self, now_s: float) -> None:
        """Forget what is old; called now and then."""


Rank = Callable[[ServerLoad], float]


class Smallest:
    """The smallest of a figure; the first of several that are equal."""

    needs_text = False

    def __init__(self, rank: Rank, needs_remote: bool = False) -> None:
        self._rank = rank
        self.needs_remote = needs_remote

    def pick(self, loads: Sequence[ServerLoad], ask: Ask) -> int:
        """See `Policy`."""
        if len(loads) == 1:
            return 0
        ranks = [self._rank(load) for load in loads]
        return ranks.index(min(ranks))

    def tidy(self, now_s: float) -> None:
        """There is nothing to forget."""


class RoundRobin:
    """One after the other."""

    needs_text = needs_remote = False

    def __init__(self) -> None:
        self._n = -1

    def pick(self, loads: Sequence[ServerLoad], ask: Ask) -> int:
        """See `Policy`."""
        self._n += 1
        return self._n % len(loads)

    def tidy(self, now_s: float) -> None:
        """There is nothing to forget."""


class Random:
    """The best of `n_drawn` different ones at random: the one with the fewest requests in flight."""

    needs_text = needs_remote = False

    def __init__(self, rng: random.Random, n_drawn: int) -> None:
        self._rng = rng
        self._n_drawn = n_drawn

    def pick(self, loads: Sequence[ServerLoad], ask: Ask) -> int:
        """See `Policy`."""
        drawn = self._rng.sample(range(len(loads)), min(self._n_drawn, len(loads)))
        return min(drawn, key=lambda i: loads[i].n_requests)

    def tidy(self, now_s: float) -> None:
        """There is nothing to forget."""


class CacheAware:
    """Weighs what a server has in its prefix cache against its load."""

    needs_text = True

    def __init__(self, settings: SchedulerSettings, n_running: Rank, needs_remote: bool) -> None:
        self.needs_remote = needs_remote
        self.n_asked = self.n_hits = 0
        self._settings = settings
        self._n_running = n_running
        self._index = PrefixIndex(settings.cache_block_size, settings.eviction_duration_mins * 60)
        self._by_tokens = Smallest(_n_tokens)

    def pick(self, loads: Sequence[ServerLoad], ask: Ask) -> int:
        """See `Policy`. The chosen server is remembered as an owner of the prompt."""
        self.n_asked += 1
        n_running = [self._n_running(load) for load in loads]
        keys = self._index.keys(ask.text)
        matched = self._index.match(keys, {load.generation for load in loads}) if keys else {}
        if self._is_uneven(n_running):
            chosen = self._by_tokens.pick(loads, ask)
        else:
            chosen = self._best(loads, n_running, matched, len(keys))
        self.n_hits += loads[chosen].generation in matched
        self._index.record(keys, loads[chosen].generation, ask.now_s)
        return chosen

    def tidy(self, now_s: float) -> None:
        """Forget prompts that nobody sent for the eviction duration."""
        self._index.evict(now_s)

    def _is_uneven(self, n_running: Sequence[float]) -> bool:
        most, least = max(n_running), min(n_running)
        gap = most - least
        settings = self._settings
        return gap > settings.balance_abs_threshold and gap / most > settings.balance_rel_threshold

    def _best(
        self, loads: Sequence[ServerLoad], n_running: Sequence[float], matched: Mapping[int, int], n_blocks: int
    ) -> int:
        most = max(n_running) or 1
        settings = self._settings

        def score(i: int) -> tuple[float, int]:
            hit = matched.get(loads[i].generation, 0) / n_blocks if n_blocks else 0.0
            load = n_running[i] / most
            return (1 - hit) * settings.hit_ratio_weight + load * settings.load_balance_weight, loads[i].n_tokens

        return min(range(len(loads)), key=score)


def _n_tokens(load: ServerLoad) -> float:
    return load.n_tokens


def _n_requests(load: ServerLoad) -> float:
    return load.n_requests


def _local_score(waiting_weight: float) -> Rank:
    return lambda load: load.n_running + load.n_waiting * waiting_weight


def _remote_score(waiting_weight: float) -> Rank:
    local = _local_score(waiting_weight)

    def score(load: ServerLoad) -> float:
        remote = load.remote
        if remote is None:
            return local(load)
        n_since = load.n_requests - remote.n_requests_then  # without it, all would go to one until the next look
        return max(remote.n_running + remote.n_waiting * waiting_weight + n_since, 0.0)

    return score


Make = Callable[[SchedulerSettings, random.Random], Policy]

POLICIES: Mapping[str, Make] = MappingProxyType(
    {
        "random": lambda settings, rng: Random(rng, 1),
        "round_robin": lambda settings, rng: RoundRobin(),
        "power_of_two": lambda settings, rng: Random(rng, 2),
        "process_tokens": lambda settings, rng: Smallest(_n_tokens),
        "request_num": lambda settings, rng: Smallest(_n_requests),
        "fd_metrics_score": lambda settings, rng: Smallest(_local_score(settings.waiting_weight)),
        "fd_remote_metrics_score": lambda settings, rng: Smallest(_remote_score(settings.waiting_weight), True),
        "cache_aware": lambda settings, rng: CacheAware(settings, _n_requests, False),
        "remote_cache_aware": lambda settings, rng: CacheAware(settings, _remote_score(1.0), True),
    }
)


def make_policy(settings: SchedulerSettings, name: str, rng: random.Random | None = None) -> Policy:
    """The policy of that name. Raises ConfigError for an unknown one."""
    make = POLICIES.get(name)
    if make is None:
        raise ConfigError(f"policy {name!r} is none of {', '.join(POLICIES)}")
    return make(settings, rng or random.Random())
