"""The router's Prometheus metrics: plain numbers, turned into text when somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastdeploy.router.placement import PairPlacer, Placer
from fastdeploy.router.policies import CacheAware
from fastdeploy.router.registry import Registry

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
QUANTILES = (0.95, 0.99)
N_DURATIONS = 2048  # the latest ones of an endpoint, from which the quantiles come
MAX_SERIES = 2000  # labels of servers come and go: the memory for them is bounded


class _Durations:
    """The durations of one method and endpoint, in seconds."""

    __slots__ = ("latest", "n", "total")

    def __init__(self) -> None:
        self.latest: deque[float] = deque(maxlen=N_DURATIONS)
        self.n = 0
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.latest.append(seconds)
        self.n += 1
        self.total += seconds


class RouterMetrics(Collector):
    """Every figure of one router; those of servers are read from the registry."""

    def __init__(self, registry: Registry, placer: Placer) -> None:
        self.n_retries = 0
        self.n_preempted = 0
        self.n_clients_gone = 0
        self.n_in_flight = 0
        self._registry = registry
        self._placer = placer
        self._http: dict[tuple[str, str, str], int] = {}
        self._inference: dict[tuple[str, str, str, str], int] = {}
        self._failures: dict[tuple[str, str], int] = {}
        self._durations: dict[tuple[str, str], _Durations] = {}
        self._collectors = CollectorRegistry()
        self._collectors.register(self)

    def http(self, method: str, endpoint: str, status: int, took_s: float) -> None:
        """A request of a client ended; `endpoint` is one of the router's paths, or "other"."""
        _count(self._http, (method, endpoint, str(status)))
        durations = self._durations.get((method, endpoint))
        if durations is None:
            durations = self._durations[method, endpoint] = _Durations()
        durations.add(took_s)

    def inference(self, mixed: str, prefill: str, decode: str, status: int) -> None:
        """A forwarded request ended; the URLs are those it was given to last, or empty."""
        _count(self._inference, (mixed, prefill, decode, str(status)))

    def failure(self, url: str, kind: str) -> None:
        """A server gave no whole answer."""
        _count(self._failures, (url, kind))

    def collect(self) -> Iterator[Metric]:
        """All metrics, as Prometheus families."""
        http = CounterMetricFamily("http_requests", "HTTP answers.", labels=["method", "endpoint", "status_code"])
        for key, n in self._http.items():
            http.add_metric(key, n)
        labels = ["mixed_worker", "prefill_worker", "decode_worker", "status_code"]
        inference = CounterMetricFamily("inference_requests", "Forwarded requests, by server.", labels=labels)
        for names, n in self._inference.items():
            inference.add_metric(names, n)
        durations = Metric("http_request_duration_seconds", "From a whole request to the end of its answer.", "summary")
        for (method, endpoint), seen in self._durations.items():
            labelled = {"method": method, "endpoint": endpoint}
            for quantile, value in zip(QUANTILES, quantiles(list(seen.latest)), strict=True):
                durations.add_sample(durations.name, {**labelled, "quantile": str(quantile)}, value)
            durations.add_sample(f"{durations.name}_count", labelled, seen.n)
            durations.add_sample(f"{durations.name}_sum", labelled, seen.total)
        yield from (http, inference, durations)
        yield from self._cache()
        yield from self._pairs()
        yield from self._own()
        yield from self._of_servers()

    def _cache(self) -> Iterator[Metric]:
        aware = [policy for policy in self._placer.policies if isinstance(policy, CacheAware)]
        n_asked, n_hits = sum(one.n_asked for one in aware), sum(one.n_hits for one in aware)
        yield CounterMetricFamily("router_cache_request", "Requests placed by a cache aware policy.", value=n_asked)
        yield CounterMetricFamily(
            "router_cache_hit", "Of those, sent to a server that had seen the beginning of the prompt.", value=n_hits
        )

    def _pairs(self) -> Iterator[Metric]:
        placer = self._placer
        if isinstance(placer, PairPlacer):
            decisions = CounterMetricFamily(
                "router_pd_decisions", "Requests given to a pair, or to decode alone and why.", labels=["decision"]
            )
            for name, n in (("pair", placer.n_pairs), ("short", placer.n_short), ("cached", placer.n_cached)):
                decisions.add_metric([name], n)
            yield decisions
            yield CounterMetricFamily(
                "router_pd_preempted", "Requests placed again as decode gave them up.", value=self.n_preempted
            )

    def _own(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("router_requests_in_flight", "Forwarded requests.", value=self.n_in_flight)
        yield CounterMetricFamily("router_retries", "Attempts at another server.", value=self.n_retries)
        yield CounterMetricFamily("router_clients_gone", "Clients that left early.", value=self.n_clients_gone)
        failures = CounterMetricFamily(
            "router_server_failures", "Requests that a server did not answer.", labels=["server", "reason"]
        )
        for key, n in self._failures.items():
            failures.add_metric(key, n)
        yield failures

    def _of_servers(self) -> Iterator[Metric]:
        well = GaugeMetricFamily("router_server_available", "Whether a server gets requests.", labels=["server"])
        requests = GaugeMetricFamily("router_server_requests", "Requests in flight at a server.", labels=["server"])
        tokens = GaugeMetricFamily("router_server_tokens", "Tokens in flight, estimated.", labels=["server"])
        events = CounterMetricFamily("router_server_events", "Stream events, about one a token.", labels=["server"])
        for server in self._registry:
            load = server.load
            well.add_metric([server.url], server in self._registry.available)
            requests.add_metric([server.url], load.n_requests)
            tokens.add_metric([server.url], load.n_tokens)
            events.add_metric([server.url], load.n_events_total)
        yield from (well, requests, tokens, events)

    def render(self) -> bytes:
        """The text to answer a scrape with."""
        return generate_latest(self._collectors)


def quantiles(values: list[float]) -> list[float]:
    """`QUANTILES` of the values, by the nearest rank; zeros when there are none."""
    ordered = sorted(values) or [0.0]
    return [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in QUANTILES]


def _count(counts: dict[Any, int], key: tuple[str, ...]) -> None:
    if key not in counts and len(counts) >= MAX_SERIES:
        key = ("other",) * len(key)
    counts[key] = counts.get(key, 0) + 1
