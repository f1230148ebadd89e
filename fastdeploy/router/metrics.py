"""The router's figures: plain numbers, added up over its workers and turned into text when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
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


class Durations(msgspec.Struct):
    """The durations of one method and endpoint, in seconds; `latest` holds the last ones, in no order."""

    n: int = 0
    total: float = 0.0
    latest: list[float] = []

    def add(self, seconds: float) -> None:
        """One more."""
        if len(self.latest) < N_DURATIONS:
            self.latest.append(seconds)
        else:
            self.latest[self.n % N_DURATIONS] = seconds
        self.n += 1
        self.total += seconds


class ServerFigures(msgspec.Struct):
    """What the router knows of one server. `n_requests`, `n_waiting` and `n_tokens` are in flight, of all workers."""

    role: str
    is_available: bool
    n_requests: int
    n_waiting: int
    n_tokens: int
    n_requests_total: int
    n_events_total: int


class Figures(msgspec.Struct):
    """All counts of one worker; `added` makes those of several into one."""

    http: dict[tuple[bytes, bytes, int], int] = {}
    inference: dict[tuple[str, str, str, int], int] = {}
    failures: dict[tuple[str, str], int] = {}
    durations: dict[tuple[bytes, bytes], Durations] = {}
    servers: dict[str, ServerFigures] = {}
    decisions: dict[str, int] = {}
    counts: dict[str, int] = {}


def added(parts: Iterable[Figures]) -> Figures:
    """The figures of several workers as if they were one; what they see alike is taken from the first."""
    total = Figures()
    for part in parts:
        for name in ("http", "inference", "failures", "decisions", "counts"):
            into: dict[Any, int] = getattr(total, name)
            for key, n in getattr(part, name).items():
                into[key] = into.get(key, 0) + n
        for key, seen in part.durations.items():
            durations = total.durations.setdefault(key, Durations())
            durations.n += seen.n
            durations.total += seen.total
            durations.latest.extend(seen.latest)
        for url, server in part.servers.items():
            known = total.servers.setdefault(url, msgspec.structs.replace(server, n_requests_total=0, n_events_total=0))
            known.n_requests_total += server.n_requests_total
            known.n_events_total += server.n_events_total
    return total


class RouterMetrics:
    """Counts what happens in one process; the loads of servers are read from the registry."""

    def __init__(self, registry: Registry, placer: Placer) -> None:
        self.n_retries = 0
        self.n_preempted = 0
        self.n_clients_gone = 0
        self.n_in_flight = 0
        self._registry = registry
        self._placer = placer
        self._seen = Figures()

    def http(self, method: bytes, endpoint: bytes, status: int, took_s: float) -> None:
        """A request of a client ended; `endpoint` is one of the router's paths, or "other"."""
        _count(self._seen.http, (method, endpoint, status))
        durations = self._seen.durations.get((method, endpoint))
        if durations is None:
            durations = self._seen.durations[method, endpoint] = Durations()
        durations.add(took_s)

    def inference(self, mixed: str, prefill: str, decode: str, status: int) -> None:
        """A forwarded request ended; the URLs are those it was given to last, or empty."""
        _count(self._seen.inference, (mixed, prefill, decode, status))

    def failure(self, url: str, kind: str) -> None:
        """A server gave no whole answer."""
        _count(self._seen.failures, (url, kind))

    def figures(self) -> Figures:
        """All counts as they are now."""
        servers = {}
        for server in self._registry:
            load = server.load
            load.see_others()
            servers[server.url] = ServerFigures(
                server.record.role,
                server in self._registry.available,
                load.n_requests,
                load.n_waiting,
                load.n_tokens,
                load.n_requests_total,
                load.n_events_total,
            )
        aware = [policy for policy in self._placer.policies if isinstance(policy, CacheAware)]
        counts = {
            "in_flight": self.n_in_flight,
            "retries": self.n_retries,
            "preempted": self.n_preempted,
            "clients_gone": self.n_clients_gone,
            "cache_asked": sum(one.n_asked for one in aware),
            "cache_hits": sum(one.n_hits for one in aware),
        }
        placer, decisions = self._placer, {}
        if isinstance(placer, PairPlacer):
            decisions = {"pair": placer.n_pairs, "short": placer.n_short, "cached": placer.n_cached}
            decisions |= {"failed": placer.n_failed, "begun": placer.n_begun}
        return msgspec.structs.replace(self._seen, servers=servers, counts=counts, decisions=decisions)


class _Page(Collector):
    """The figures as Prometheus families."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        figures = self._figures
        yield _counter("http_requests", "HTTP answers.", ("method", "endpoint", "status_code"), figures.http)
        labels = ("mixed_worker", "prefill_worker", "decode_worker", "status_code")
        yield _counter("inference_requests", "Forwarded requests, by server.", labels, figures.inference)
        yield self._durations()
        yield from self._own()
        yield from self._of_servers()

    def _durations(self) -> Metric:
        family = Metric("http_request_duration_seconds", "From a whole request to the end of its answer.", "summary")
        for (method, endpoint), seen in self._figures.durations.items():
            names = {"method": _text(method), "endpoint": _text(endpoint)}
            for quantile, value in zip(QUANTILES, quantiles(list(seen.latest)), strict=True):
                family.add_sample(family.name, {**names, "quantile": str(quantile)}, value)
            family.add_sample(f"{family.name}_count", names, seen.n)
            family.add_sample(f"{family.name}_sum", names, seen.total)
        return family

    def _own(self) -> Iterator[Metric]:
        counts, figures = self._figures.counts, self._figures
        help_text = "Requests placed by a cache aware policy."
        yield CounterMetricFamily("router_cache_request", help_text, value=counts["cache_asked"])
        help_text = "Of those, sent to a server that had seen the beginning of the prompt."
        yield CounterMetricFamily("router_cache_hit", help_text, value=counts["cache_hits"])
        if figures.decisions:
            decisions = {(name,): n for name, n in figures.decisions.items()}
            help_text = "Requests given to a pair, or to decode alone and why."
            yield _counter("router_pd_decisions", help_text, ("decision",), decisions)
            help_text = "Requests placed again as decode gave them up."
            yield CounterMetricFamily("router_pd_preempted", help_text, value=counts["preempted"])
        yield GaugeMetricFamily("router_requests_in_flight", "Forwarded requests.", value=counts["in_flight"])
        yield CounterMetricFamily("router_retries", "Attempts at another server.", value=counts["retries"])
        yield CounterMetricFamily("router_clients_gone", "Clients that left early.", value=counts["clients_gone"])
        help_text = "Requests that a server did not answer."
        yield _counter("router_server_failures", help_text, ("server", "reason"), figures.failures)

    def _of_servers(self) -> Iterator[Metric]:
        well = GaugeMetricFamily("router_server_available", "Whether a server gets requests.", labels=["server"])
        requests = GaugeMetricFamily("router_server_requests", "Requests in flight at a server.", labels=["server"])
        tokens = GaugeMetricFamily("router_server_tokens", "Tokens in flight, estimated.", labels=["server"])
        events = CounterMetricFamily("router_server_events", "Stream events, about one a token.", labels=["server"])
        for url, server in self._figures.servers.items():
            well.add_metric([url], server.is_available)
            requests.add_metric([url], server.n_requests)
            tokens.add_metric([url], server.n_tokens)
            events.add_metric([url], server.n_events_total)
        yield from (well, requests, tokens, events)


def rendered(figures: Figures) -> bytes:
    """The text to answer a scrape with."""
    registry = CollectorRegistry()
    registry.register(_Page(figures))
    return generate_latest(registry)


def shown(figures: Figures) -> dict[str, Any]:
    """What the page of the router shows, as JSON values."""
    n_failures: dict[str, int] = {}
    for (url, _), n in figures.failures.items():
        n_failures[url] = n_failures.get(url, 0) + n
    servers = [
        {"url": url, **msgspec.structs.asdict(server), "n_failures": n_failures.get(url, 0)}
        for url, server in sorted(figures.servers.items())
    ]
    n_answers, n_errors = sum(figures.http.values()), sum(n for key, n in figures.http.items() if key[2] >= 400)
    totals = {"n_answers": n_answers, "n_errors": n_errors, **figures.counts}
    return {"servers": servers, "totals": totals, "decisions": figures.decisions}


def quantiles(values: list[float]) -> list[float]:
    """`QUANTILES` of the values, by the nearest rank; zeros when there are none."""
    ordered = sorted(values) or [0.0]
    return [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in QUANTILES]


def _counter(name: str, help_text: str, labels: tuple[str, ...], counts: dict[Any, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for key, n in counts.items():
        family.add_metric([_text(one) for one in key], n)
    return family


def _count(counts: dict[Any, int], key: tuple[Any, ...]) -> None:
    n = counts.get(key)
    if n is None and len(counts) >= MAX_SERIES:
        key = tuple(type(one)() for one in key)
        n = counts.get(key)
    counts[key] = (n or 0) + 1


def _text(label: bytes | str | int) -> str:
    return label.decode("latin-1") if isinstance(label, bytes) else str(label)
