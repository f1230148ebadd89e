"""Metrics: the public names and types, and what is counted."""

from __future__ import annotations

import threading

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fastdeploy.observability.metrics import MAX_HTTP_SERIES, Metrics
from fastdeploy.wire.experts import ExpertReport
from fastdeploy.wire.messages import RequestTimes, Status

pytestmark = pytest.mark.timeout(60)

REQUEST_BUCKETS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
TOKEN_BUCKETS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 33792]
COUNTERS = (
    "requests_number request_success request_preempted prompt_tokens generation_tokens prefix_cache_token_num "
    "prefix_gpu_cache_token_num prefix_cpu_cache_token_num prefix_storage_cache_token_num"
)
GAUGES = (
    "num_requests_enqueued num_requests_waiting num_requests_running num_requests_preempted first_token_latency "
    "infer_latency batch_size max_batch_size available_batch_size hit_req_rate hit_token_rate cpu_hit_token_rate "
    "gpu_hit_token_rate available_gpu_block_num free_gpu_block_num max_gpu_block_num available_gpu_resource "
    "gpu_cache_usage_perc cache_config_info"
)
HISTOGRAMS: dict[str, list[float]] = {
    "time_to_first_token_seconds": [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1],
    "time_per_output_token_seconds": [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1],
    "e2e_request_latency_seconds": REQUEST_BUCKETS,
    "request_inference_time_seconds": REQUEST_BUCKETS,
    "request_queue_time_seconds": REQUEST_BUCKETS,
    "request_prefill_time_seconds": REQUEST_BUCKETS,
    "request_decode_time_seconds": REQUEST_BUCKETS,
    "request_prompt_tokens": TOKEN_BUCKETS,
    "request_generation_tokens": TOKEN_BUCKETS,
    "request_params_max_tokens": TOKEN_BUCKETS,
}
TIMES = RequestTimes(received_s=100.0, first_scheduled_s=100.5, first_token_s=101.5, last_token_s=103.5)
STATUS = Status(
    n_running=3,
    n_waiting=2,
    n_preempted_total=1,
    n_pages_free=40,
    n_pages_cached=20,
    n_pages_total=80,
    n_prompt_tokens_total=1000,
    n_cached_tokens_total=250,
    n_generated_tokens_total=70,
    n_steps_total=9,
    n_running_tokens=0,
    n_waiting_tokens=0,
    stalled_s=0.0,
)


def test_experts_that_move_are_counted_over_all_ranks() -> None:
    report = ExpertReport([[1, 2, 3], [4, 0, 0]], [[0, 1, 2, 0]] * 2, 5, 6, 70, 1.5, 1.25)
    later = replace(report, rows_le=[[10, 0, 0], [0, 0, 1]], n_checks_total=6)
    metrics = Metrics()
    metrics.update_ranks({0: replace(STATUS, experts=report), 1: replace(STATUS, experts=later), 2: STATUS}, 1.0)
    found = samples(metrics)
    of_experts = [found[f'expert_tokens_total{{expert="{i}"}}'] for i in range(3)]
    assert of_experts == [15, 2, 4]
    assert found["eplb_checks_total"] == 6
    assert found["eplb_moved_experts_total"] == 6
    assert found["eplb_pause_milliseconds_total"] == 70
    assert found["eplb_busiest_over_mean_before"] == 1.5
    assert found["eplb_busiest_over_mean_after"] == 1.25


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of the rendered text, by name and labels as written."""
    found = {}
    for line in metrics.render().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.removeprefix("fastdeploy:")] = float(value)
    return found


def test_names_types_and_buckets() -> None:
    families = {
        family.name.removeprefix("fastdeploy:"): family
        for family in text_string_to_metric_families(Metrics().render().decode())
    }
    for kind, names in (("counter", COUNTERS.split()), ("gauge", GAUGES.split()), ("histogram", list(HISTOGRAMS))):
        for name in names:
            assert families[name].type == kind, name
            assert families[name].documentation
    for name, bounds in HISTOGRAMS.items():
        shown = [one.labels["le"] for one in families[name].samples if one.name.endswith("_bucket")]
        assert [float(bound) for bound in shown[:-1]] == bounds, name
        assert shown[-1] == "+Inf"


def test_counters_end_in_total_once() -> None:
    text = Metrics().render().decode()
    for name in COUNTERS.split():
        assert f"\nfastdeploy:{name}_total 0.0\n" in text
    assert "_total_total" not in text
    assert "_created" not in text


def test_registries_are_separate() -> None:
    one, other = Metrics(), Metrics()
    one.request_received()
    assert samples(one)["requests_number_total"] == 1
    assert samples(other)["requests_number_total"] == 0
    given = CollectorRegistry()
    assert Metrics(given).registry is given


def test_life_of_a_request() -> None:
    metrics = Metrics()
    metrics.request_received()
    metrics.request_started()
    assert samples(metrics)["num_requests_enqueued"] == 1
    metrics.first_token(TIMES)
    metrics.token_gap(0.03)
    metrics.token_gaps([0.06, 0.06])
    metrics.token_gap(5.0, n_tokens=2)
    metrics.request_finished(TIMES, 100, 20, 64, 50, "stop")
    seen = samples(metrics)
    expected = {
        "num_requests_enqueued": 0,
        "request_success_total": 1,
        'requests_ended_total{reason="stop"}': 1,
        "time_to_first_token_seconds_sum": 1.5,
        "first_token_latency": 1.5,
        "request_queue_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_sum": 1.0,
        "e2e_request_latency_seconds_sum": 3.5,
        "request_inference_time_seconds_sum": 3.0,
        "infer_latency": 3.0,
        "request_decode_time_seconds_sum": 2.0,
        "request_prompt_tokens_sum": 100,
        "request_generation_tokens_sum": 20,
        "request_params_max_tokens_sum": 50,
        "request_token_ratio_count": 1,
        "hit_req_rate": 1.0,
        "time_per_output_token_seconds_count": 5,
        'time_per_output_token_seconds_bucket{le="0.025"}': 0,
        'time_per_output_token_seconds_bucket{le="0.05"}': 1,
        'time_per_output_token_seconds_bucket{le="0.075"}': 3,
        'time_per_output_token_seconds_bucket{le="1.0"}': 3,
        'time_per_output_token_seconds_bucket{le="+Inf"}': 5,
    }
    assert {name: seen[name] for name in expected} == pytest.approx(expected)
    assert seen["time_per_output_token_seconds_sum"] == pytest.approx(10.15)


def test_a_value_on_a_bound_is_below_it() -> None:
    metrics = Metrics()
    metrics.token_gap(0.01)
    assert samples(metrics)['time_per_output_token_seconds_bucket{le="0.01"}'] == 1


@pytest.mark.parametrize("times", [None, RequestTimes(100.0, 0.0, 0.0, 0.0)])
def test_aborted_requests_leave_no_times(times: RequestTimes | None) -> None:
    metrics = Metrics()
    metrics.request_started()
    metrics.request_finished(times, 10, 0, 0, 50, "abort")
    seen = samples(metrics)
    assert seen['requests_ended_total{reason="abort"}'] == 1
    assert seen["request_success_total"] == seen["e2e_request_latency_seconds_count"] == 0
    assert seen["num_requests_enqueued"] == 0


def test_a_clock_set_back_does_not_shrink_sums() -> None:
    metrics = Metrics()
    metrics.first_token(RequestTimes(100.0, 90.0, 95.0, 95.0))
    assert samples(metrics)["time_to_first_token_seconds_sum"] == 0


def test_state_of_the_engine() -> None:
    metrics = Metrics()
    metrics.update(STATUS)
    seen = samples(metrics)
    expected = {
        "num_requests_waiting": 2,
        "num_requests_running": 3,
        "num_requests_preempted": 1,
        "batch_size": 3,
        "request_preempted_total": 1,
        "prompt_tokens_total": 1000,
        "generation_tokens_total": 70,
        "prefix_cache_token_num_total": 250,
        "prefix_gpu_cache_token_num_total": 250,
        "hit_token_rate": 0.25,
        "gpu_hit_token_rate": 0.25,
        "cpu_hit_token_rate": 0,
        "available_gpu_block_num": 60,
        "free_gpu_block_num": 40,
        "max_gpu_block_num": 80,
        "available_gpu_resource": 0.75,
        "gpu_cache_usage_perc": 0.25,
    }
    assert {name: seen[name] for name in expected} == expected


def test_totals_are_not_counted_twice_and_survive_a_new_engine() -> None:
    metrics = Metrics()
    for total in (50, 70, 70, 70, 10, 30):  # a new engine starts after 70
        metrics.update(replace(STATUS, n_generated_tokens_total=total))
    seen = samples(metrics)
    assert seen["generation_tokens_total"] == 100
    assert seen["prompt_tokens_total"] == 1000
    assert seen["num_requests_preempted"] == 0


def test_configuration() -> None:
    from fastdeploy.config.schema import CacheConfig, ParallelConfig, SchedulerConfig

    class Model:
        dtype = "bfloat16"
        device = "cuda"

    class Config:
        cache = CacheConfig(page_tokens=16)
        scheduler = SchedulerConfig(max_seqs=8)
        parallel = ParallelConfig()
        model = Model()

    metrics = Metrics()
    metrics.configure(Config(), n_pages=80)  # type: ignore[arg-type]
    metrics.update(STATUS)
    seen = samples(metrics)
    assert (seen["max_batch_size"], seen["available_batch_size"]) == (8, 5)
    (info,) = [name for name in seen if name.startswith("cache_config_info")]
    assert seen[info] == 1
    for label in ('block_size="16"', 'num_gpu_blocks="80"', 'enable_prefix_caching="True"', 'cache_dtype="bfloat16"'):
        assert label in info


def test_http_answers_are_bounded() -> None:
    metrics = Metrics()
    metrics.http_request("POST", "/v1/completions", 200)
    metrics.http_request("POST", "/v1/completions", 200)
    for i in range(2 * MAX_HTTP_SERIES):
        metrics.http_request("GET", f"/{i}", 404)
    seen = {name: n for name, n in samples(metrics).items() if name.startswith("http_requests_total")}
    assert seen['http_requests_total{method="POST",path="/v1/completions",status="200"}'] == 2
    assert len(seen) == MAX_HTTP_SERIES + 1
    assert sum(seen.values()) == 2 + 2 * MAX_HTTP_SERIES


def test_another_thread_may_render() -> None:
    metrics, stop, failed = Metrics(), threading.Event(), []

    def scrape() -> None:
        while not stop.is_set():
            try:
                metrics.render()
            except Exception as exc:
                failed.append(exc)
                return

    thread = threading.Thread(target=scrape)
    thread.start()
    for i in range(MAX_HTTP_SERIES):
        metrics.http_request("GET", f"/{i}", 200)
        metrics.update(STATUS)
    stop.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert not failed
