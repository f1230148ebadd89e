"""How evenly --scheduler-name splitwise spreads requests over the ranks of all servers when one server gets them all.

    python benchmarks/redis_balance.py            # about 2 minutes on 2 cores
    python benchmarks/redis_balance.py --quick    # smoke check

Several servers, started like the online command of the data-parallel service's documentation (expert parallelism
inside each, `--scheduler-ttl 9000`), share a private Redis. Requests of very different lengths come in bursts of random
sizes, all to the first server. What each rank got is read from /metrics: requests from the first server's, tokens from
each server's own. Beside it stands what a blind draw of a rank for each of the same requests gives (median of many).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import uvloop
from engine_process import child_environ
from machine import CpuClock
from report import Report, figure
from server_process import HOST, ServerProcess

from fastdeploy.admission.private_redis import PrivateRedis
from fastdeploy.bench.connection import HttpClient
from fastdeploy.bench.load import LoadGenerator, LoadRun, Target
from fastdeploy.bench.workloads import Request
from fastdeploy.demo.model import build_demo_model

NAME = "redis_balance"
KINDS = ((16, 48, 8, 24), (64, 192, 16, 48), (384, 768, 32, 64))  # tokens of prompt and answer, from and to
N_DRAWS = 1000
TIMEOUT_S = 300.0
SETTLE_S = 2.0  # ranks say what they have done once a second
LIMIT = 1.25  # largest over mean
_PLACED = re.compile(r'^fastdeploy:scheduler_placed_on_node_total\{node="([0-9a-f]{32})(\d+)"\} (\S+)$', re.MULTILINE)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks of each server")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second, on average")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def bursts(seconds: float, rate: float, seed: int = 1) -> list[Request]:
    """One to twelve requests at a time, at random times; short, usual and long ones mixed."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    now_s, mean_size = 0.0, 6.5
    while (now_s := now_s + rng.exponential(mean_size / rate)) < seconds:
        for _ in range(int(rng.integers(1, 13))):
            low, high, least, most = KINDS[rng.choice(3, p=(0.6, 0.3, 0.1))]
            ids = rng.integers(10, 10_000, size=int(rng.integers(low, high)))
            requests.append(Request(len(ids), int(rng.integers(least, most)), partial(np.array, ids), now_s))
    return requests


def seed_command(model: Path, flags: argparse.Namespace, redis: PrivateRedis) -> list[str]:
    """The documentation's online command, for a CPU; every port is a free one."""
    words = ["--model", str(model), "--device", "cpu", "--max-model-len", "2048", "--num-gpu-blocks-override", "256"]
    words += ["--data-parallel-size", str(flags.ranks), "--tensor-parallel-size", "1", "--enable-expert-parallel"]
    words += ["--scheduler-name", "splitwise", *redis.flags, "--scheduler-topic", "test", "--scheduler-ttl", "9000"]
    return words


async def offer(url: str, requests: Sequence[Request]) -> LoadRun:
    """All requests at their times."""
    client, target = HttpClient(url, None, TIMEOUT_S), Target(endpoint="/v1/completions", model="default")
    async with client.watched():
        return await LoadGenerator(client, target, lambda _: None).open_loop(requests)


def of_ranks(text: str, name: str) -> list[int]:
    """A figure of each rank of a server, from its metrics."""
    found = re.findall(rf'^fastdeploy:dp_rank_{name}\{{dp_rank="(\d+)"\}} (\S+)$', text, re.MULTILINE)
    return [int(float(value)) for _, value in sorted(found)]


def busiest(values: Sequence[float]) -> float:
    """Largest over mean; 1 is even."""
    return max(values) / statistics.fmean(values)


def blind(weights: Sequence[int], n_ranks: int) -> float:
    """The median of `busiest` over many draws that know nothing of load."""
    rng, found = random.Random(0), []
    for _ in range(N_DRAWS):
        sums = [0] * n_ranks
        for weight in weights:
            sums[rng.randrange(n_ranks)] += weight
        found.append(busiest(sums))
    return statistics.median(found)


def main() -> None:
    flags = parse_flags()
    requests = bursts(8.0 if flags.quick else flags.seconds, flags.rate)
    model, environ = build_demo_model(form="moe"), child_environ(1)
    n_ranks = flags.servers * flags.ranks
    title = f"{flags.servers} servers of {flags.ranks} ranks, all requests sent to the first"
    report = Report(NAME, title, {**vars(flags), "n_requests": len(requests), "kinds": KINDS})
    with ExitStack() as stack:
        redis = stack.enter_context(PrivateRedis())
        command = seed_command(model, flags, redis)
        report.settings["server_flags"] = [word for word in command if word not in (redis.password, str(model))]
        servers = [stack.enter_context(ServerProcess(command, environ)) for _ in range(flags.servers)]
        roots = [server.pid for server in servers]
        clock = CpuClock.start(*roots)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            run = runner.run(offer(f"http://{HOST}:{servers[0].port}", requests))
            runner.run(asyncio.sleep(SETTLE_S))
        cpu, pages = clock.since(*roots), [server.get("/metrics") for server in servers]
    placed = [int(float(n)) for _, _, n in sorted(_PLACED.findall(pages[0]))]
    by_rank = {
        "requests": (placed + [0] * n_ranks)[:n_ranks],
        "prompt tokens": [n for page in pages for n in of_ranks(page, "prompt_tokens")],
        "generated tokens": [n for page in pages for n in of_ranks(page, "generated_tokens")],
    }
    weights = {
        "requests": [1] * len(requests),
        "prompt tokens": [request.n_input for request in requests],
        "generated tokens": [request.n_output for request in requests],
    }
    failed = [answer.error_text for answer in run.answers if answer.error is not None]
    seconds = run.end_s - run.start_s
    report.add_round(seconds=seconds, n_failed=len(failed), errors=failed[:5], by_rank=by_rank, cpu_s=cpu)
    report.notes.append("requests of ranks are in the order of node ids, tokens in that of servers")
    for what, values in by_rank.items():
        report.notes.append(f"{what} by rank: {values}, of {sum(weights[what])} sent")
        report.summary.append(figure(f"{what}, busiest rank over mean", "ratio", [busiest(values)], LIMIT))
        report.summary.append(figure(f"{what}, the same of a blind draw", "ratio", [blind(weights[what], n_ranks)]))
    report.summary.append(figure("requests that failed", "", [len(failed)], 0))
    report.finish(flags.output)


if __name__ == "__main__":
    main()
