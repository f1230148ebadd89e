"""Data and expert parallelism on a CPU against one rank that has all cores: 32 requests of mixed lengths.

    python benchmarks/cpu_data_parallel.py            # about 5 minutes on 2 cores
    python benchmarks/cpu_data_parallel.py --quick    # smoke check

One rank with `--threads` threads is the peer of as many data-parallel ranks with one thread each, with and without
expert parallelism. The engines run in processes of their own that stay alive, and take turns. Beside the throughput,
what it costs that ranks agree on each step and exchange rows: both are measured between two processes that do nothing
else.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from dp_exchange import agreement_us, exchange_us
from engine_process import EngineProcess
from engines import LOAD_TIMEOUT_S, add_common_flags, common_settings, fastdeploy, measure, result_path
from report import Report, compare, equal_tokens
from workload import PromptMaker, Workload

from fastdeploy.config.model_shape import read_model_shape
from fastdeploy.demo.model import build_demo_model

NAME = "cpu_data_parallel"
TARGET = 0.95
N_REQUESTS = 32
MAX_SEQS = 32


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, default_rounds=5)
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    report = Report(NAME, "One rank, and data-parallel ranks with one thread each", common_settings(flags))
    model = build_demo_model(form="moe")
    n_ranks = flags.threads
    maker = PromptMaker(model)
    longest = (64, 16) if flags.quick else (256, 128)
    cases = [
        maker.uniform("equal", N_REQUESTS, longest[0] // 2, longest[1] // 2),
        maker.mixed("mixed", N_REQUESTS, (16, longest[0]), (4 if flags.quick else 16, longest[1])),
    ]
    report.settings["workloads"] = {workload.name: workload.describe() for workload in cases}
    one = fastdeploy(model, flags, MAX_SEQS)
    flags.threads = 1
    ranks = {"data_parallel_size": n_ranks, "num_gpu_blocks_override": 512}
    engines: dict[str, EngineProcess] = {
        f"one rank, {n_ranks} threads": one,
        f"DP={n_ranks}, EP={n_ranks}": fastdeploy(model, flags, MAX_SEQS, enable_expert_parallel=True, **ranks),
        f"DP={n_ranks}, replicas": fastdeploy(model, flags, MAX_SEQS, **ranks),
    }
    try:
        for name, engine in engines.items():
            engine.start(LOAD_TIMEOUT_S)
            report.versions[name] = engine.description
        for workload in cases:
            run_case(report, workload, engines, flags)
    finally:
        for engine in engines.values():
            engine.close()
    note_costs(report, n_ranks, str(model))
    report.finish(result_path(flags, NAME))


def run_case(report: Report, workload: Workload, engines: dict[str, EngineProcess], flags: argparse.Namespace) -> None:
    """All rounds of one workload, the engines in turns, and their lines of the summary."""
    pids = [engine.pid for engine in engines.values()]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.generate(workload.prompts, [min(n, 4) for n in workload.n_outputs])
    for i in range(flags.rounds):
        for name, engine in engines.items():
            one_round = partial(measure, report, workload, engine, pids, form=name, round=i)
            results[name].append(report.undisturbed(one_round, flags.tries))
    (peer_name, peer), *others = results.items()
    for name, ours in others:
        what = f"{N_REQUESTS} {workload.name} requests, {name}"
        rates = [[r["output_tokens_per_s"] for r in rounds] for rounds in (ours, peer)]
        target = TARGET if "EP" in name else None
        report.summary.append(compare(what, "output tokens/s", rates[0], peer_name, rates[1], target))
        agreement = equal_tokens(ours[0]["token_ids"], peer[0]["token_ids"])
        n_equal, n_answers = agreement["answers_equal"], agreement["answers"]
        report.notes.append(f"{workload.name}, {name}: {n_equal} of {n_answers} greedy answers equal one rank's")


def note_costs(report: Report, n_ranks: int, model: str) -> None:
    """Agreement and exchange of one step, alone and as a share of a step of this run."""
    from pathlib import Path

    shape = read_model_shape(Path(model))
    assert shape.moe is not None
    n_sparse, n_rows = len(shape.moe.layers), N_REQUESTS // n_ranks
    agree_us = agreement_us(n_ranks)
    pair_us = exchange_us(n_ranks, n_rows, shape)
    rates = [line for line in report.summary if "EP" in line.what]
    step_us = N_REQUESTS / rates[0].ours.median * 1e6
    per_step_us = agree_us + n_sparse * pair_us
    report.settings["costs_of_a_step"] = {
        "agreement_us": round(agree_us, 1),
        "dispatch_and_combine_us": round(pair_us, 1),
        "sparse_layers": n_sparse,
        "rows_per_rank": n_rows,
        "together_us": round(per_step_us),
        "step_us_at_the_measured_rate": round(step_us),
        "share_of_the_step": round(per_step_us / step_us, 4),
    }
    report.notes.append(
        f"a step of {N_REQUESTS} rows: agreement {agree_us:.0f} us, dispatch and combine {pair_us:.0f} us in each of "
        f"{n_sparse} layers, together {per_step_us / 1000:.1f} ms of about {step_us / 1000:.0f} ms "
        f"({per_step_us / step_us:.1%})"
    )


if __name__ == "__main__":
    main()
