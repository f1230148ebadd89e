"""Dispatch and combine between the GPUs of this host: the exchange through mapped memory, and NCCL's, in one run.

Each is captured in a graph and replayed; a figure is the median over repetitions of the slowest rank, in microseconds.
The floor is what crosses the link each way over the rate of a plain copy between two GPUs, measured here too.

    python benchmarks/all_to_all.py --output all_to_all.json                              # rows of ERNIE-4.5-21B-A3B
    python benchmarks/all_to_all.py --gpus 4 --hidden 8192 --experts-per-token 8 --output all_to_all.json  # 300B-A47B
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "parallel"), str(Path(__file__).parents[1])]

import rank_calls  # noqa: E402
from machine import hardware  # noqa: E402
from rank_processes import RankProcesses, State  # noqa: E402

from fastdeploy.config.schema import ParallelConfig  # noqa: E402

ROWS = (1, 8, 64, 128, 256, 4096)
N_LAYERS, N_REPLAYS = 20, 15  # exchanges in a graph, replays timed


def join(state: State, parallel: ParallelConfig, number: int, meeting: rank_calls.Meeting) -> None:
    """This rank's GPU and group."""
    from fastdeploy.distributed import groups

    torch.cuda.set_device(number)
    device = torch.device("cuda", number)
    state["group"] = groups.join(parallel, number, device, *meeting, state.get("store"), patience_s=60)


def make(state: State, name: str, hidden: int, n_experts: int, k: int) -> None:
    """The exchange called `name`, for rows with `k` of `n_experts` experts each."""
    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all

    rows = ExpertRows(n_experts, k, hidden, torch.bfloat16, True)
    state[name] = make_all_to_all(name, state["group"], rows)


def measure(state: State, name: str, hidden: int, n_experts: int, k: int, n_rows: int) -> list[float]:
    """Microseconds of one dispatch and combine, for each replay."""
    from fastdeploy.distributed.topology import cut_into_pieces
    from fastdeploy.layers.moe.gate import Routing

    number = state["group"].where.group_rank
    all_to_all, size = state[name], state["group"].where.group_size
    x_tH = torch.randn(n_rows, hidden, device="cuda", dtype=torch.bfloat16)
    expert_tk = torch.rand(n_rows, n_experts, device="cuda").topk(k).indices
    routing, n_rows_g = Routing(expert_tk, torch.rand(n_rows, k, device="cuda")), (n_rows,) * size

    pieces = cut_into_pieces(n_rows_g, all_to_all.max_rows)  # as a layer does when not all rows fit at once

    def exchange() -> list[torch.Tensor]:
        given = []
        for piece in pieces:
            first = piece.first_g[number]
            rows = slice(first, first + piece.n_rows_g[number])
            part = Routing(routing.expert_tk[rows], routing.weight_tk[rows])
            sent = all_to_all.dispatch(x_tH[rows], part, piece.n_rows_g)
            given.append(all_to_all.combine(sent.x_rH, sent))
        return given

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            exchange()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        kept = [exchange() for _ in range(N_LAYERS)]
        graph.capture_end()
        times = []
        for i in range(N_REPLAYS + 3):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(stop) * 1000 / N_LAYERS)
    del kept
    return times


def copy_rate() -> float:
    """Bytes per second of a copy from one GPU to another."""
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
    here = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    rates = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        there.copy_(here, non_blocking=True)
        stop.record()
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        rates.append((1 << 30) / start.elapsed_time(stop) * 1000)
    return max(rates)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--experts-per-token", type=int, default=6)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rate, ranks = copy_rate(), RankProcesses()
    parallel = ParallelConfig(data=args.gpus, expert=True)
    results = []
    rows = (args.hidden, args.experts, args.experts_per_token)
    try:
        meetings = rank_calls.meet(ranks, parallel)
        ranks.call(join, [(parallel, number, meeting) for number, meeting in enumerate(meetings)])
        for name in ("symm_mem", "nccl"):
            ranks.call(make, [(name, *rows)] * args.gpus)
        print(f"copy between two GPUs {rate / 1e9:.0f} GB/s\nrows  floor  " + "  ".join(("symm_mem", "nccl")))
        for n_rows in ROWS:
            floor_us = 2 * n_rows * args.hidden * 2 * (args.gpus - 1) / rate * 1e6
            line = {"rows_per_rank": n_rows, "floor_us": round(floor_us, 2)}
            for name in ("symm_mem", "nccl"):
                times_g = ranks.call(measure, [(name, *rows, n_rows)] * args.gpus)
                line[f"{name}_us"] = round(max(statistics.median(times) for times in times_g), 2)
            results.append(line)
            print(*line.values(), flush=True)
    finally:
        ranks.stop()
    gpus = [torch.cuda.get_device_name(i) for i in range(args.gpus)]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["all_to_all.py", *sys.argv[1:]]),
        "hardware": {**hardware(), "gpus": gpus},
        "torch": torch.__version__,
        "hidden": args.hidden,
        "experts": args.experts,
        "experts_per_token": args.experts_per_token,
        "copy_gb_per_s": round(rate / 1e9, 1),
        "results": results,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
