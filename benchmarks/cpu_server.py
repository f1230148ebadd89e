"""The real API server against the offline LLM on the same requests: what HTTP and streaming cost, and latencies.

    python benchmarks/cpu_server.py

All requests of a case are sent at once and streamed by a client of raw sockets (`sse_client`), which shares the cores
with the server. Server and LLM have the same flags, live in processes of their own and take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from engine_process import child_environ
from engines import LOAD_TIMEOUT_S, MAX_MODEL_LEN, add_common_flags, common_settings, fastdeploy, measure, result_path
from machine import CpuClock
from report import Report, compare, figure
from server_process import HOST, ServerProcess
from sse_client import StreamTimes, stream_all
from workload import PromptMaker, Workload

from fastdeploy.demo.model import build_demo_model

NAME = "cpu_server"
TARGET = 0.9
PERCENTILES = (50, 90, 99)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, default_rounds=5)
    parser.add_argument("--form", choices=("moe", "dense"), default="moe", help="(default: %(default)s)")
    parser.add_argument("--requests", nargs="+", type=int, default=[16, 32], help="requests at once (default: 16 32)")
    return parser.parse_args()


def percentile(values: list[float], percent: int) -> float:
    """Linear between the closest ranks."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def measure_server(report: Report, workload: Workload, server: ServerProcess, idle_pid: int, i: int) -> dict[str, Any]:
    """One round over HTTP. The client is this process; its CPU time is given apart."""
    roots = (server.pid, idle_pid)
    own_start = sum(os.times()[:2])
    load, clock = os.getloadavg()[0], CpuClock.start(*roots)
    wall_s, answers = asyncio.run(stream_all(HOST, server.port, workload))
    usage = clock.since(*roots)
    client_cpu_s = sum(os.times()[:2]) - own_start
    usage["foreign_cpu_s"] = round(max(usage["foreign_cpu_s"] - client_cpu_s, 0.0), 2)
    figures = {
        "round": i,
        "case": workload.name,
        "engine": "api_server",
        "wall_s": round(wall_s, 4),
        "output_tokens": workload.n_output_tokens,
        "output_tokens_per_s": round(workload.n_output_tokens / wall_s, 3),
        "client_cpu_s": round(client_cpu_s, 2),
        "load_average": round(load, 2),
        **usage,
        "ttft_s": [round(answer.ttft_s, 4) for answer in answers],
        "tpot_s": [round(answer.tpot_s, 5) for answer in answers],
    }
    report.add_round(**figures)
    return {**figures, "answers": answers}


def latency_lines(report: Report, workload: Workload, rounds: list[dict[str, Any]]) -> None:
    """Percentiles over the requests of a round; the table has their spread over rounds."""

    def values(answers: list[StreamTimes], name: str) -> list[float]:
        return [getattr(answer, f"{name}_s") * 1000 for answer in answers if name == "ttft" or answer.n_tokens > 1]

    for name, title in (("ttft", "time to first token"), ("tpot", "time per output token")):
        for percent in PERCENTILES:
            by_round = [percentile(values(r["answers"], name), percent) for r in rounds]
            report.summary.append(figure(f"{workload.name} requests, server, {title}, p{percent}", "ms", by_round))


def run(report: Report, flags: argparse.Namespace) -> None:
    """Interleaved rounds of every number of requests."""
    model, max_seqs = build_demo_model(form=flags.form), max(flags.requests)
    maker = PromptMaker(model)
    prompt, output = ((16, 64), (4, 16)) if flags.quick else ((16, 256), (16, 128))
    cases = [maker.mixed(str(n), n, prompt, output) for n in flags.requests]
    report.settings["workloads"] = {workload.name: workload.describe() for workload in cases}
    server_flags = server_command(model, flags, max_seqs)
    environ = child_environ(flags.threads)
    with fastdeploy(model, flags, max_seqs) as offline, ServerProcess(server_flags, environ) as server:
        report.versions["offline LLM"] = offline.start(LOAD_TIMEOUT_S).description
        for workload in cases:
            offline.generate(workload.prompts, workload.n_outputs)  # warm-up
            asyncio.run(stream_all(HOST, server.port, workload))
            served, direct = [], []
            for i in range(flags.rounds):
                over_http = partial(measure_server, report, workload, server, offline.pid, i)
                served.append(report.undisturbed(over_http, flags.tries))
                in_process = partial(measure, report, workload, offline, [server.pid], round=i)
                direct.append(report.undisturbed(in_process, flags.tries))
            what, key = f"{workload.name} mixed requests, API server", "output_tokens_per_s"
            ours, peer = [r[key] for r in served], [r[key] for r in direct]
            report.summary.append(compare(what, "output tokens/s", ours, "offline LLM", peer, TARGET))
            latency_lines(report, workload, served)


def server_command(model: Path, flags: argparse.Namespace, max_seqs: int) -> list[str]:
    """The same settings as `engines.fastdeploy`, as flags."""
    settings = {
        "model": model,
        "device": "cpu",
        "dtype": flags.dtype,
        "threads": flags.threads,
        "max-model-len": MAX_MODEL_LEN,
        "max-num-seqs": max_seqs,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + [
        "--no-enable-prefix-caching"
    ]


def main() -> None:
    flags = parse_flags()
    settings = common_settings(flags) | {"form": flags.form, "client": "asyncio sockets and httptools, in this process"}
    report = Report(NAME, "API server on a CPU against the offline LLM, streaming", settings)
    run(report, flags)
    report.notes.append("the server's CPU seconds do not include the client's, which are given as client_cpu_s")
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
