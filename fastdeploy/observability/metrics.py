"""The Prometheus metrics of one server, in a registry of their own.

All values are plain numbers of this object, turned into Prometheus families when somebody scrapes: counting a token
costs an addition, and counters of the engine are its totals, which cannot be counted twice. One thread writes (that of
the front end's event loop); any thread may render.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastdeploy.config.schema import EngineConfig
from fastdeploy.observability.experts import together
from fastdeploy.observability.totals import EngineTotal
from fastdeploy.wire.experts import ExpertReport
from fastdeploy.wire.messages import FinishReason, RequestTimes, Status

PREFIX = "fastdeploy:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_HTTP_SERIES = 200  # (method, path, status) triples; more are counted as path "other"

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0)
_TOKEN_GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_N_TOKENS = (*(digit * 10.0**power for power in range(5) for digit in (1, 2, 5) if digit * 10**power <= 20000), 33792.0)

_HISTOGRAMS: Mapping[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_FIRST_TOKEN_S, "From the arrival of a request to its first token."),
    "time_per_output_token_seconds": (_TOKEN_GAP_S, "Between two tokens of a request."),
    "e2e_request_latency_seconds": (_REQUEST_S, "From the arrival of a request to its last token."),
    "request_inference_time_seconds": (_REQUEST_S, "From the first step of a request to its last token."),
    "request_queue_time_seconds": (_REQUEST_S, "From the arrival of a request to its first step."),
    "request_prefill_time_seconds": (_REQUEST_S, "From the first step of a request to its first token."),
    "request_decode_time_seconds": (_REQUEST_S, "From the first token of a request to its last."),
    "request_prompt_tokens": (_N_TOKENS, "Prompt tokens of a request."),
    "request_generation_tokens": (_N_TOKENS, "Generated tokens of a request."),
    "request_params_max_tokens": (_N_TOKENS, "max_tokens of a request."),
    "request_token_ratio": (
        _N_TOKENS,
        "Generated tokens per second of a request, from its first step to its last token.",
    ),
}
_COUNTERS: Mapping[str, str] = {
    "requests_number": "Requests received.",
    "request_success_total": "Requests that ended with stop or length.",
    "request_preempted_total": "Preemptions.",
    "prompt_tokens_total": "Prompt tokens of requests that ran, cached ones included.",
    "generation_tokens_total": "Generated tokens.",
    "prefix_cache_token_num": "Prompt tokens found in the prefix cache.",
    "prefix_gpu_cache_token_num": "Prompt tokens found in the prefix cache on the device.",
    "prefix_cpu_cache_token_num": "Prompt tokens found in the prefix cache in host memory (there is none).",
    "send_cache_failed_num": "Prompts computed for a decode server that did not take the pages.",
    "pd_pulled_requests": "Requests decoded here whose prompt was computed by a prefill server.",
    "pd_pulled_blocks": "Pages read from prefill servers.",
    "pd_pulled_bytes": "Bytes of these pages.",
    "pd_wait_milliseconds": "From pages reserved to pages filled, of all pulled requests together.",
    "prefix_storage_cache_token_num": "Prompt tokens found in the prefix cache in storage (there is none).",
}
_GAUGES: Mapping[str, str] = {
    "num_requests_enqueued": "Requests handed to the engine that have not ended.",
    "num_requests_waiting": "Requests waiting for a step.",
    "num_requests_running": "Requests that take part in steps.",
    "num_requests_preempted": "Preemptions between the last two reports of the engine.",
    "first_token_latency": "Last time to first token, seconds.",
    "infer_latency": "Last time from first step to last token, seconds.",
    "batch_size": "Requests that take part in steps.",
    "max_batch_size": "Most requests that may take part in steps.",
    "available_batch_size": "Requests that could join.",
    "hit_req_rate": "Share of ended requests that found tokens in the prefix cache.",
    "hit_token_rate": "Share of prompt tokens found in the prefix cache.",
    "gpu_hit_token_rate": "Share of prompt tokens found in the prefix cache on the device.",
    "cpu_hit_token_rate": "Share of prompt tokens found in the prefix cache in host memory (there is none).",
    "available_gpu_block_num": "Pages that can be given out: free ones and reusable prefix pages.",
    "free_gpu_block_num": "Pages without content.",
    "max_gpu_block_num": "All pages.",
    "available_gpu_resource": "Share of pages that can be given out.",
    "gpu_cache_usage_perc": "Share of pages that requests hold, 0 to 1.",
    "pd_awaiting_requests": "Requests here that await pages of a prefill server.",
    "pd_lent_blocks": "Pages of ended requests that a decode server may still read.",
    "dp_balance_ratio": "Mean over largest load of the data-parallel ranks, in tokens; 1 is even.",
}
_RANK_GAUGES: Mapping[str, tuple[str, str]] = {
    "dp_rank_running_requests": ("n_running", "Requests of a data-parallel rank that take part in steps."),
    "dp_rank_waiting_requests": ("n_waiting", "Requests that wait for a step of a data-parallel rank."),
    "dp_rank_running_tokens": ("n_running_tokens", "Known tokens of a data-parallel rank's running requests."),
    "dp_rank_waiting_tokens": ("n_waiting_tokens", "Prompt tokens that wait for a data-parallel rank."),
    "dp_rank_free_blocks": ("n_pages_free", "Pages of a data-parallel rank without content."),
    "dp_rank_cached_blocks": ("n_pages_cached", "Reusable prefix pages of a data-parallel rank that nobody holds."),
    "dp_rank_prompt_tokens": ("n_prompt_tokens_total", "Prompt tokens of requests that a data-parallel rank ran."),
    "dp_rank_generated_tokens": ("n_generated_tokens_total", "Tokens that a data-parallel rank has generated."),
}


class _Histogram:
    """Counts per bucket; `observe` is a bisection and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, n: int = 1) -> None:
        """Count `value`, `n` times."""
        self.counts[bisect_left(self.bounds, value)] += n
        self.total += value * n

    def family(self, name: str, help_text: str) -> HistogramMetricFamily:
        """The state as Prometheus wants it: cumulative counts."""
        bounds = [*(_number(bound) for bound in self.bounds), "+Inf"]
        return HistogramMetricFamily(
            name, help_text, list(zip(bounds, accumulate(self.counts), strict=True)), self.total
        )


def _number(bound: float) -> str:
    return str(float(bound))


def _eplb_families(report: ExpertReport) -> Iterator[Metric]:
    for name, value, help_text in (
        ("eplb_checks", report.n_checks_total, "Looks at where experts should lie."),
        ("eplb_moved_experts", report.n_moved_total, "Slots that got another expert."),
        ("eplb_pause_milliseconds", report.pause_ms_total, "Time in which no step ran, of all checks together."),
    ):
        yield CounterMetricFamily(PREFIX + name, help_text, value=value)
    for name, ratio, when in (("before", report.before, "found"), ("after", report.after, "left")):
        help_text = f"Rows of the busiest over those of the mean rank, as the last check {when} it."
        yield GaugeMetricFamily(f"{PREFIX}eplb_busiest_over_mean_{name}", help_text, value=ratio)


class Metrics(Collector):
    """Every metric of one server.

    The life of a request: `request_received`, then `request_started` when it was handed to the engine, `first_token`,
    `token_gaps`, and `request_finished`, which every started request reaches exactly once.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._gauges = dict.fromkeys(_GAUGES, 0.0)
        self._histograms = {name: _Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}
        self._token_gaps = self._histograms["time_per_output_token_seconds"]
        self._finished: dict[str, int] = {}
        self._http: dict[tuple[str, str, str], int] = {}
        self._cache_info: dict[str, str] = {}
        self._totals = {
            name: EngineTotal() for name in ("preempted", "prompt_tokens", "cached_tokens", "generated_tokens")
        }
        self._fallbacks: Mapping[str, int] = {}
        self._n_ended = 0
        self._n_ended_with_hit = 0
        self._status_d: Mapping[int, Status] = {}
        self._gauges["dp_balance_ratio"] = 1.0
        self.registry.register(self)

    # ---- requests ----

    def request_received(self) -> None:
        """A request arrived."""
        self._counters["requests_number"] += 1

    def request_started(self) -> None:
        """A request was handed to the engine."""
        self._gauges["num_requests_enqueued"] += 1

    def first_token(self, times: RequestTimes) -> None:
        """A request has its first token."""
        seconds = times.first_token_s - times.received_s
        self._gauges["first_token_latency"] = max(seconds, 0.0)
        self._observe("time_to_first_token_seconds", seconds)
        self._observe("request_queue_time_seconds", times.first_scheduled_s - times.received_s)
        self._observe("request_prefill_time_seconds", times.first_token_s - times.first_scheduled_s)

    def token_gap(self, seconds: float, n_tokens: int = 1) -> None:
        """`n_tokens` tokens came, each `seconds` after the one before."""
        self._token_gaps.observe(seconds, n_tokens)

    def token_gaps(self, gaps_s: Iterable[float]) -> None:
        """The gaps of all streams of one step."""
        observe = self._token_gaps.observe
        for seconds in gaps_s:
            observe(seconds)

    def request_finished(
        self,
        times: RequestTimes | None,
        n_prompt: int,
        n_generated: int,
        n_cached: int,
        max_tokens: int,
        finish_reason: FinishReason,
    ) -> None:
        """A started request ended. Times and sizes are recorded for those that ended with stop or length."""
        self._gauges["num_requests_enqueued"] = max(self._gauges["num_requests_enqueued"] - 1, 0)
        self._finished[finish_reason] = self._finished.get(finish_reason, 0) + 1
        self._n_ended += 1
        self._n_ended_with_hit += n_cached > 0
        self._gauges["hit_req_rate"] = self._n_ended_with_hit / self._n_ended
        if finish_reason not in ("stop", "length"):
            return
        self._counters["request_success_total"] += 1
        self._observe("request_prompt_tokens", n_prompt)
        self._observe("request_generation_tokens", n_generated)
        self._observe("request_params_max_tokens", max_tokens)
        if times is None or not times.last_token_s:
            return
        inference_s = max(times.last_token_s - times.first_scheduled_s, 0.0)
        self._gauges["infer_latency"] = inference_s
        self._observe("e2e_request_latency_seconds", times.last_token_s - times.received_s)
        self._observe("request_inference_time_seconds", inference_s)
        self._observe("request_decode_time_seconds", times.last_token_s - times.first_token_s)
        if inference_s > 0:
            self._observe("request_token_ratio", n_generated / inference_s)

    def http_request(self, method: str, path: str, status: int) -> None:
        """An HTTP answer went out; `path` is the route, not what the client wrote."""
        key = (method, path, str(status))
        if key not in self._http and len(self._http) >= MAX_HTTP_SERIES:
            key = ("other", "other", "other")
        self._http[key] = self._http.get(key, 0) + 1

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(max(value, 0.0))  # a clock set back must not make a sum shrink

    # ---- the engine ----

    def configure(self, config: EngineConfig, n_pages: int) -> None:
        """The engine is ready with this configuration and this many pages."""
        cache, scheduler = config.cache, config.scheduler
        n_seqs = scheduler.max_seqs * len(config.parallel.serves)
        self._gauges["max_batch_size"] = self._gauges["available_batch_size"] = n_seqs
        self._gauges["max_gpu_block_num"] = n_pages
        self._cache_info = {
            "block_size": str(cache.page_tokens),
            "num_gpu_blocks": str(n_pages),
            "gpu_memory_utilization": str(cache.memory_fraction),
            "enable_prefix_caching": str(cache.prefix_caching),
            "enable_output_caching": str(cache.output_caching),
            "cache_dtype": config.model.dtype,
            "device": config.model.device,
        }

    def update_ranks(self, statuses: Mapping[int, Status], balance_ratio: float) -> None:
        """What each data-parallel rank reported last, and how even their load is."""
        self._status_d = statuses
        self._gauges["dp_balance_ratio"] = balance_ratio

    def update(self, status: Status) -> None:
        """The engine reported its state: that of all engine cores together."""
        totals, gauges, counters = self._totals, self._gauges, self._counters
        gauges["num_requests_preempted"] = totals["preempted"].update(status.n_preempted_total)
        totals["prompt_tokens"].update(status.n_prompt_tokens_total)
        totals["cached_tokens"].update(status.n_cached_tokens_total)
        totals["generated_tokens"].update(status.n_generated_tokens_total)
        n_prompt, n_cached = totals["prompt_tokens"].value, totals["cached_tokens"].value
        counters["request_preempted_total"] = totals["preempted"].value
        counters["prompt_tokens_total"] = n_prompt
        counters["generation_tokens_total"] = totals["generated_tokens"].value
        counters["prefix_cache_token_num"] = counters["prefix_gpu_cache_token_num"] = n_cached
        gauges["hit_token_rate"] = gauges["gpu_hit_token_rate"] = n_cached / n_prompt if n_prompt else 0.0
        pairing = status.pairing
        counters["send_cache_failed_num"] = pairing.n_send_failed_total
        counters["pd_pulled_requests"] = pairing.n_pulled_total
        counters["pd_pulled_blocks"] = pairing.n_pulled_pages_total
        counters["pd_pulled_bytes"] = pairing.n_pulled_bytes_total
        counters["pd_wait_milliseconds"] = pairing.wait_ms_total
        gauges["pd_awaiting_requests"] = pairing.n_awaiting
        gauges["pd_lent_blocks"] = pairing.n_lent_pages
        self._fallbacks = pairing.n_fallbacks_of_reason
        gauges["num_requests_waiting"] = status.n_waiting
        gauges["num_requests_running"] = gauges["batch_size"] = status.n_running
        gauges["available_batch_size"] = max(gauges["max_batch_size"] - status.n_running, 0)
        n_available = status.n_pages_free + status.n_pages_cached
        share = n_available / status.n_pages_total if status.n_pages_total else 0.0
        gauges["available_gpu_block_num"] = n_available
        gauges["free_gpu_block_num"] = status.n_pages_free
        gauges["max_gpu_block_num"] = status.n_pages_total
        gauges["available_gpu_resource"] = share
        gauges["gpu_cache_usage_perc"] = 1.0 - share if status.n_pages_total else 0.0

    # ---- scraping ----

    def collect(self) -> Iterator[Metric]:
        """All metrics, as Prometheus families."""
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, help_text, value=self._counters[name])
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, help_text, value=self._gauges[name])
        for name, (_, help_text) in _HISTOGRAMS.items():
            yield self._histograms[name].family(PREFIX + name, help_text)
        for name, (field, help_text) in _RANK_GAUGES.items():
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["dp_rank"])
            for data_rank, status in sorted(self._status_d.items()):
                family.add_metric([str(data_rank)], getattr(status, field))
            yield family
        experts = CounterMetricFamily(
            PREFIX + "expert_tokens", "Rows, of any rank, that the experts of these ranks computed.", labels=["expert"]
        )
        report = together({rank: s.experts for rank, s in list(self._status_d.items()) if s.experts is not None})
        if report is not None:  # experts that move are counted where rows come from, by layer
            for expert, rows in enumerate(zip(*report.rows_le, strict=True)):
                experts.add_metric([str(expert)], sum(rows))
            yield from _eplb_families(report)
        for status in list(self._status_d.values()):
            for expert, n in sorted(status.n_rows_of_expert.items()):
                experts.add_metric([str(expert)], n)
        yield experts
        fallbacks = CounterMetricFamily(
            PREFIX + "pd_fallbacks", "Prompts computed by the decode server after all, by reason.", labels=["reason"]
        )
        for reason, n in sorted(self._fallbacks.items()):
            fallbacks.add_metric([reason], n)
        yield fallbacks
        ended = CounterMetricFamily(PREFIX + "requests_ended", "Requests that ended, by reason.", labels=["reason"])
        for reason, n in list(self._finished.items()):
            ended.add_metric([reason], n)
        yield ended
        http = CounterMetricFamily(PREFIX + "http_requests", "HTTP answers.", labels=["method", "path", "status"])
        for key, n in list(self._http.items()):
            http.add_metric(key, n)
        yield http
        info = GaugeMetricFamily(PREFIX + "cache_config_info", "The KV cache; always 1.", labels=list(self._cache_info))
        if self._cache_info:
            info.add_metric(list(self._cache_info.values()), 1)
        yield info

    def render(self) -> bytes:
        """The text to answer a scrape with; its content type is `CONTENT_TYPE`."""
        return generate_latest(self.registry)
