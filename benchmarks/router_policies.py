"""Policies of the router compared: eight synthetic servers, one load after the other, the same for each policy.

    python benchmarks/router_policies.py uneven
    python benchmarks/router_policies.py mooncake --trace mooncake_conversation.jsonl

`uneven`: requests of very different sizes at random times, and a server that takes three times as long for everything.
`mooncake`: the beginning of the conversation trace, with times and lengths scaled; tokens follow from its hash ids, so
that prefixes are shared, and all servers are alike. Servers and router are started anew for each policy: caches are
cold. Rates are low enough for a small machine: `cpu_share` is the share of all its cores that the servers, the router
and the client took, `foreign_cpu_share` that of other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from machine import CpuClock, hardware
from report import RESULTS, own_versions, shown_command
from synthetic_fleet import Fleet, metrics_of

from fastdeploy.bench.connection import HttpClient
from fastdeploy.bench.flags import RequestArgs
from fastdeploy.bench.load import LoadGenerator, LoadRun, Target
from fastdeploy.bench.report import table
from fastdeploy.bench.traces import trace_workload
from fastdeploy.bench.workloads import Request
from fastdeploy.router.policies import POLICIES

N_SERVERS = 8
BASE = "round_robin"
TIMEOUT_S = 300.0
UNEVEN_PACE = {"step_ms": 40.0, "prompt_token_ms": 0.2, "sequence_ms": 0.5}
TRACE_PACE = {"step_ms": 40.0, "prompt_token_ms": 0.25, "sequence_ms": 0.5}
SLOW_FACTOR = 3.0
FLAGS = ("--max-num-seqs", "64", "--max-model-len", "16384", "--num-gpu-blocks-override", "2048", "--block-size", "32")
COLUMNS = (
    "policy",
    "answered",
    "failed",
    "mean",
    "p50",
    "p99",
    "E2E mean",
    "p50",
    "p99",
    "cached",
    "requests by server",
)


def uneven_requests(seconds: float, rate: float, seed: int) -> list[Request]:
    """Three kinds of requests, mixed at random: short, usual, and long ones that make most of the work."""
    rng = np.random.default_rng(seed)
    kinds = ((32, 256, 8, 24), (256, 1024, 16, 48), (4096, 12288, 32, 96))  # tokens of prompt and answer, from and to
    requests, now_s = [], 0.0
    while (now_s := now_s + rng.exponential(1 / rate)) < seconds:
        low, high, least, most = kinds[rng.choice(3, p=(0.6, 0.32, 0.08))]
        ids = rng.integers(10, 256, size=int(rng.integers(low, high)))
        requests.append(Request(len(ids), int(rng.integers(least, most)), partial(_same, ids), now_s))
    return requests


def _same(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ids


def trace_requests(trace: Path, seconds: float, time_scale: float, length_scale: float) -> list[Request]:
    """The requests of the trace that come in its first `seconds` (scaled)."""
    workload = trace_workload(RequestArgs(trace=str(trace), time_scale=time_scale, length_scale=length_scale))
    return [request for request in workload.requests if request.arrival_s < seconds]


async def offer(url: str, requests: Sequence[Request]) -> LoadRun:
    """All requests at their times."""
    client = HttpClient(url, None, TIMEOUT_S)
    target = Target(endpoint="/v1/completions", model="default", vocab_size=256)
    async with client.watched():
        return await LoadGenerator(client, target, lambda _: None).open_loop(requests)


def measure(
    policy: str, keys: Mapping[str, Any], requests: Sequence[Request], paces: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """One policy: start everything, offer the load, look at what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler = {"policy": policy, "cache-block-size": 32, **keys}
        with Fleet(Path(folder), scheduler, paces, FLAGS) as fleet:
            roots = [fleet.router.process.pid, *(server.process.pid for server in fleet.servers)]
            clock, start_s = CpuClock.start(*roots), time.perf_counter()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                run = runner.run(offer(fleet.router.url, requests))
            seconds = time.perf_counter() - start_s
            found = metrics_of(fleet.router.url)
            cpu = clock.since(*roots)
            n_by_server = [
                sum(int(n) for name, n in found.items() if name.startswith("inference_requests_total") and url in name)
                for url in (url.removeprefix("http://") for url in fleet.urls)
            ]
    whole = [answer for answer in run.answers if answer.error is None]
    n_input, n_cores = sum(answer.n_input for answer in whole), int(str(hardware()["cores"]))
    return {
        "policy": policy,
        "n_sent": len(run.answers),
        "n_answered": len(whole),
        "n_failed": len(run.answers) - len(whole),
        "errors": sorted({answer.error_text for answer in run.answers if answer.error is not None})[:5],
        "seconds": seconds,
        "ttft_ms": _summary([answer.timing.ttft_s for answer in whole]),
        "e2e_ms": _summary([answer.timing.e2e_s for answer in whole]),
        "cached_share": sum(answer.n_cached_tokens or 0 for answer in whole) / max(n_input, 1),
        "n_by_server": n_by_server,
        "late_p99_ms": float(np.percentile(run.late_s, 99)) * 1000,
        "cpu_share": (cpu["measured_cpu_s"] + cpu["idle_engines_cpu_s"] + run.cpu_s) / seconds / n_cores,
        "foreign_cpu_share": max(cpu["foreign_cpu_s"] - run.cpu_s, 0.0) / seconds / n_cores,
        "router_core_share": cpu["measured_cpu_s"] / seconds,
    }


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    ms = np.array(seconds) * 1000
    return {"mean": float(ms.mean()), **{f"p{p}": float(np.percentile(ms, p)) for p in (50, 90, 99)}}


def shown(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The table; TTFT and E2E in ms."""
    rows = [COLUMNS]
    for one in rounds:
        ttft, e2e = one["ttft_ms"], one["e2e_ms"]
        figures = [f"{part[name]:.0f}" for part in (ttft, e2e) for name in ("mean", "p50", "p99")]
        counts = " ".join(map(str, one["n_by_server"]))
        row = (one["policy"], one["n_answered"], one["n_failed"], *figures, f"{one['cached_share']:.0%}", counts)
        rows.append(tuple(map(str, row)))
    return table(rows)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Bars of the TTFT, and what each server got."""
    rounds = content["rounds"]
    figure = import_module("matplotlib.figure").Figure(figsize=(14, 5), layout="constrained")
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.suptitle(f"{content['title']}, {content['date']}")
    left, right = figure.subplots(1, 2)
    names = [one["policy"] for one in rounds]
    for i, statistic in enumerate(("mean", "p50", "p99")):
        at = [k + 0.27 * i for k in range(len(names))]
        bars = left.bar(at, [one["ttft_ms"][statistic] for one in rounds], 0.25, label=statistic)
        left.bar_label(bars, fmt="%.0f", fontsize=6)
    left.set_xticks([k + 0.27 for k in range(len(names))], names, rotation=30, ha="right")
    left.set_title("TTFT, ms")
    left.legend()
    for i in range(N_SERVERS):
        below = [sum(one["n_by_server"][:i]) for one in rounds]
        right.bar(names, [one["n_by_server"][i] for one in rounds], bottom=below, label=f"server {i}")
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set_title("requests by server")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=("uneven", "mooncake"))
    parser.add_argument("--trace", type=Path, help="the trace's file, for mooncake")
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help="names with commas between; round_robin is added"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals, for each policy")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second, for uneven")
    parser.add_argument("--time-scale", type=float, default=0.1, help="of the trace; 0.1 is ten times as fast")
    parser.add_argument("--length-scale", type=float, default=0.0625, help="of the trace's lengths and blocks")
    parser.add_argument(
        "--scheduler", type=json.loads, default={}, help="JSON: more keys of the router's scheduler section"
    )
    parser.add_argument("--output", type=Path, help="JSON file; the plot lies beside it")
    args = parser.parse_args(argv)
    if args.load == "mooncake" and args.trace is None:
        parser.error("mooncake: --trace is needed")
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    now = datetime.datetime.now(datetime.UTC)
    if args.load == "uneven":
        slow = {name: value * SLOW_FACTOR for name, value in UNEVEN_PACE.items()}
        paces = [UNEVEN_PACE] * (N_SERVERS - 1) + [slow]
        requests = uneven_requests(args.seconds, args.rate, seed=1)
        settings: dict[str, Any] = {"rate": args.rate, "slow_server": N_SERVERS - 1, "slow_factor": SLOW_FACTOR}
    else:
        paces = [TRACE_PACE] * N_SERVERS
        requests = trace_requests(args.trace, args.seconds, args.time_scale, args.length_scale)
        settings = {"trace": args.trace.name, "time_scale": args.time_scale, "length_scale": args.length_scale}
    rounds = []
    for policy in dict.fromkeys((BASE, *args.policies.split(","))):
        rounds.append(measure(policy, args.scheduler, requests, paces))
        print(shown(rounds[-1:]), file=sys.stderr, flush=True)
    base_ms = rounds[0]["ttft_ms"]["p99"]
    for one in rounds:
        one["ttft_p99_to_round_robin"] = one["ttft_ms"]["p99"] / base_ms
    content = {
        "benchmark": f"router_policies_{args.load}",
        "title": f"policies of fd-router, {N_SERVERS} synthetic servers, {args.load}",
        "date": now.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": own_versions(),
        "command": shown_command(sys.argv),
        "settings": {
            **settings,
            "scheduler": args.scheduler,
            "seconds": args.seconds,
            "n_requests": len(requests),
            "input_tokens": sum(request.n_input for request in requests),
            "output_tokens": sum(request.n_output for request in requests),
            "paces": paces,
            "server_flags": FLAGS,
        },
        "rounds": rounds,
    }
    path = args.output or RESULTS / f"router_policies_{args.load}-{content['date']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, path.with_suffix(".png"))
    print(shown(rounds))
    print(f"raw figures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
