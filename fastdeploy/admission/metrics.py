"""Figures of a waiting room that is shared through Redis, for /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

PREFIX = "fastdeploy:scheduler_"


class AdmissionMetrics(Collector):
    """Plain numbers, written by the front end's thread."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.placed: Counter[str] = Counter()  # "own" or "other" server
        self.placed_on: Counter[str] = Counter()  # by node, as long as it is there
        self.placed_again = 0
        self.stolen = 0
        self.redis_errors = 0
        self.reports = 0  # load reports written
        self.n_queued = 0  # accepted, not on a node yet
        self.n_alive = 0  # accepted, not ended
        self.n_for_others = 0  # running here for other servers
        self.redis_up = True
        self.load_of_node: dict[str, int] = {}
        if registry is not None:
            registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All of them, as Prometheus families."""
        placed = CounterMetricFamily(PREFIX + "placed", "Requests given to a node.", labels=["where"])
        for where in ("own", "other"):
            placed.add_metric([where], self.placed[where])
        yield placed
        placed_on = CounterMetricFamily(
            PREFIX + "placed_on_node", "Requests accepted here and given to a node of the cluster.", labels=["node"]
        )
        for node, count in list(self.placed_on.items()):
            placed_on.add_metric([node], count)
        yield placed_on
        for name, text, count in (
            ("placed_again", "Requests given to another node because the first was lost.", self.placed_again),
            ("stolen", "Requests of other servers taken over for lack of own ones.", self.stolen),
            ("redis_errors", "Commands that Redis did not answer.", self.redis_errors),
            ("load_reports", "Load reports written to Redis.", self.reports),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=count)
        for name, text, number in (
            ("queued_requests", "Accepted requests that no node has.", self.n_queued),
            ("accepted_requests", "Accepted requests that have not ended.", self.n_alive),
            ("requests_of_others", "Requests that run here for other servers.", self.n_for_others),
            ("redis_up", "Whether Redis answers.", float(self.redis_up)),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=number)
        loads = GaugeMetricFamily(
            PREFIX + "node_load",
            "Load of each node: prompt tokens; requests of a decode node; queued requests with global.",
            labels=["node"],
        )
        for node, load in list(self.load_of_node.items()):
            loads.add_metric([node], load)
        yield loads
