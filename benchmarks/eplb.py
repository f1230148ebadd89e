"""Balanced experts against fixed ones on a CPU: two ranks, 64 experts, rows routed by Zipf's law.

    python benchmarks/eplb.py            # about 3 minutes on 2 cores
    python benchmarks/eplb.py --quick    # smoke check

Two rank processes with a thread each run steps of a random model with 4 sparse layers, 6 experts a row. A router stands
in that draws experts with probability 1 / (1 + i), without drawing one twice for a row: `sorted` lets the expert i be
the i-th most wanted, so that the hot ones start on one rank; `shuffled` draws an order for each layer. Variants take
turns, step by step: experts where they start, after one rearrangement, and after one with a slot more on each rank. A
step takes as long as its slowest rank does. Writes results/eplb-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

from machine import hardware
from report import RESULTS, own_versions, shown_command

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import CacheConfig, EngineConfig, EplbConfig, ParallelConfig

N_RANKS, N_EXPERTS, K, WIDTH, N_LAYERS, PAGE_TOKENS = 2, 64, 6, 512, 4, 16
PATIENCE_S = 300.0
N_CHECKS = 6
VARIANTS = {"fixed": None, "balanced": 0, "balanced, a slot more on each rank": N_RANKS}


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; no valid figures, no result file")
    parser.add_argument("--steps", type=int, default=30, help="steps of each case (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 256], help="of each rank in a step")
    return parser.parse_args()


def config_of(redundant: int | None, rank: int) -> EngineConfig:
    """The demo model's shape, with other sizes."""
    from fastdeploy.demo.model import build_demo_model

    base = resolve(EngineArgs(model=str(build_demo_model(form="moe")), device="cpu", dtype="float32"))
    assert base.model.shape.moe is not None
    moe = replace(
        base.model.shape.moe,
        n_experts=N_EXPERTS,
        n_experts_per_token=K,
        expert_width=WIDTH,
        layers=tuple(range(1, N_LAYERS + 1)),
    )
    shape = replace(base.model.shape, n_layers=N_LAYERS + 1, moe=moe)
    return replace(
        base,
        model=replace(base.model, shape=shape, random_weights=True, max_model_len=512),
        cache=CacheConfig(page_tokens=PAGE_TOKENS, n_pages=64),
        parallel=ParallelConfig(data=N_RANKS, expert=True, data_rank=rank),
        eplb=None if redundant is None else EplbConfig(redundant=redundant, interval_s=0.0, min_gain=0.0),
    )


def serve(pipe: Connection, rank: int) -> None:
    """A rank process: builds a runner for each variant, then takes steps as it is told, until it is told nothing."""
    import torch

    from fastdeploy.distributed import groups
    from fastdeploy.runner.build import build_runner

    torch.set_num_threads(1)
    runners = {}
    for variant, redundant in VARIANTS.items():
        config = config_of(redundant, rank)
        store = None
        if rank == 0:
            store, host, port = groups.open_store(config.parallel, 0)
            pipe.send((host, port))
        host, port = pipe.recv()
        meeting = Met(config.parallel, rank, host, port, store)
        runners[variant], _ = build_runner(config, number=rank, meeting=meeting)
    pipe.send("ready")
    while (call := pipe.recv()) is not None:
        runner = runners[call.pop("variant")]
        pipe.send(route(runner, **call) if "order" in call else step(runner, **call))


class Met:
    """Implements groups.Meeting."""

    def __init__(self, parallel: ParallelConfig, rank: int, host: str, port: int, store: Any) -> None:
        from fastdeploy.distributed import groups

        self._join = lambda: groups.join(parallel, rank, _cpu(), host, port, self.store(), patience_s=PATIENCE_S)
        self._store = store or groups.reach_store(rank, host, port, PATIENCE_S)

    def store(self) -> Any:
        return self._store

    def join(self) -> Any:
        return self._join()


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def route(runner: Any, order: str) -> None:
    """Draw experts by Zipf's law from here on, the same in each variant."""
    import torch

    from fastdeploy.layers.moe.gate import Routing

    for number, layer in enumerate(runner.model.sparse_layers()):
        generator = torch.Generator().manual_seed(number)
        place_e = torch.arange(N_EXPERTS) if order == "sorted" else torch.randperm(N_EXPERTS, generator=generator)
        log_p_e = -(1.0 + place_e).log()
        drawn = torch.Generator().manual_seed(100 * number + runner.config.parallel.data_rank)

        def gate(x_tH: Any, log_p_e: Any = log_p_e, drawn: Any = drawn) -> Routing:
            noise_te = -torch.empty(x_tH.shape[0], N_EXPERTS).exponential_(generator=drawn).log()
            expert_tk = (log_p_e + noise_te).topk(K).indices
            return Routing(expert_tk, torch.full(expert_tk.shape, 1 / K))

        layer.gate.forward = gate


def step(runner: Any, n_rows: int, rearrange: bool) -> dict[str, Any]:
    """One step of a new prompt; how long it took and, with load balancing, what experts were used."""
    from fastdeploy.sampling_params import SamplingParams
    from fastdeploy.wire.messages import SlotStart, StepAgreement, StepPlan

    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0).resolved({}, 8)
    pages = list(range(-(-(n_rows + 1) // PAGE_TOKENS)))
    start = SlotStart(0, [5] * (n_rows + 1), n_rows + 1, 0, pages, params)
    agreement = StepAgreement([n_rows] * N_RANKS, n_rows, False, rearrange)
    began_s = time.perf_counter()
    runner.launch(StepPlan(0, [start], [0], [n_rows], [False], [[]], agreement))()
    took_s = time.perf_counter() - began_s
    if runner.balancer is None:
        return {"took_s": took_s}
    report = runner.balancer.report()
    figures = {"rows_le": report.rows_le, "slots_lp": report.slots_lp}
    return {"took_s": took_s, **figures, "moved": report.n_moved_total, "pause_ms": report.pause_ms_total}


class Ranks:
    """Both rank processes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(N_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for _ in VARIANTS:
            address = self.receive(0)
            for pipe in self.pipes:
                pipe.send(address)
        for rank in range(N_RANKS):
            self.receive(rank)

    def receive(self, rank: int) -> Any:
        """What a rank says next. Raises TimeoutError."""
        if not self.pipes[rank].poll(PATIENCE_S):
            raise TimeoutError(f"rank {rank} said nothing for {PATIENCE_S:.0f} s")
        return self.pipes[rank].recv()

    def call(self, **call: Any) -> list[Any]:
        """The same of all ranks at once."""
        for pipe in self.pipes:
            pipe.send(dict(call))
        return [self.receive(rank) for rank in range(N_RANKS)]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def measure(ranks: Ranks, order: str, n_rows: int, n_steps: int) -> dict[str, Any]:
    """Rows a second of each variant; how even the ranks were in these steps, and would be with experts in runs."""
    last: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, Any] = {"order": order, "rows_per_rank": n_rows, "variants": {variant: {} for variant in VARIANTS}}
    for variant in VARIANTS:
        ranks.call(variant=variant, order=order)
        first = ranks.call(variant=variant, n_rows=n_rows, rearrange=False)
        n_steps_before = max(n_steps // 3, 4096 // (K * n_rows) + 1)
        for i in range(
            n_steps_before
        ):  # rows from which experts are placed; with each check those of before weigh less
            last[variant] = ranks.call(variant=variant, n_rows=n_rows, rearrange=i >= n_steps_before - N_CHECKS)
        if "moved" in first[0]:
            moved, pause_ms = (last[variant][0][name] - first[0][name] for name in ("moved", "pause_ms"))
            found["variants"][variant] |= {"moved_slots": moved, "pause_ms_of_all_checks": pause_ms}
    took_s: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    answers_of = dict(last)
    for _ in range(n_steps):
        for variant in VARIANTS:
            answers_of[variant] = ranks.call(variant=variant, n_rows=n_rows, rearrange=False)
            took_s[variant].append(max(answer["took_s"] for answer in answers_of[variant]))
    for variant, times in took_s.items():
        figures = found["variants"][variant]
        figures["rows_per_s"] = round(N_RANKS * n_rows / statistics.median(times), 1)
        by_step = sorted(a / b for a, b in zip(took_s["fixed"], times, strict=True))
        quartiles = [round(by_step[len(by_step) * q // 4], 4) for q in (1, 2, 3)]
        figures["over_fixed"] = dict(zip(("quartile 1", "median", "quartile 3"), quartiles, strict=True))
        if "moved_slots" in figures:
            figures["busiest_over_mean"] = evenness(last[variant], answers_of[variant])
    return found


def evenness(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """Of the rows between two answers of all ranks."""
    from fastdeploy.distributed.expert_placement import busiest_over_mean

    rows_le = [[0] * N_EXPERTS for _ in range(N_LAYERS)]
    for sign, answers in ((-1, before), (1, after)):
        for answer in answers:
            for layer, rows_e in enumerate(answer["rows_le"]):
                rows_le[layer] = [a + sign * b for a, b in zip(rows_le[layer], rows_e, strict=True)]
    runs = [tuple(range(N_EXPERTS))] * N_LAYERS
    slots_l = [tuple(slots) for slots in after[0]["slots_lp"]]
    ratios = (round(busiest_over_mean(rows_le, slots, N_RANKS), 4) for slots in (runs, slots_l))
    return dict(zip(("experts in runs", "as placed"), ratios, strict=True))


def main() -> None:
    flags = parse_flags()
    n_steps = 3 if flags.quick else flags.steps
    load_before, hidden = os.getloadavg()[0], config_of(None, 0).model.shape.hidden_size
    ranks = Ranks()
    try:
        cases = [measure(ranks, order, n_rows, n_steps) for order in ("sorted", "shuffled") for n_rows in flags.rows]
    finally:
        ranks.stop()
    result = {
        "command": shown_command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": load_before,
        "steps": n_steps,
        "model": f"hidden {hidden}, {N_LAYERS} sparse layers of {N_EXPERTS} experts of width {WIDTH}, float32",
        "experts_per_row": K,
        "hardware": hardware(),
        "versions": own_versions(),
        "cases": cases,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if not flags.quick:
        (RESULTS / f"eplb-{datetime.now(UTC).date()}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
