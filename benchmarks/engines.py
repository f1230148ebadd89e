"""The engines that the CPU benchmarks compare, set up alike, and the measurement of one round."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_process import EngineProcess, child_environ
from machine import CpuClock
from report import Report
from workload import Workload

LOAD_TIMEOUT_S = 600.0
MAX_MODEL_LEN = 2048


def add_common_flags(parser: argparse.ArgumentParser, default_rounds: int) -> None:
    """Flags that every CPU benchmark has."""
    parser.add_argument(
        "--quick", action="store_true", help="a smoke check: one round, short answers; no valid figures"
    )
    parser.add_argument("--rounds", type=int, default=default_rounds, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--tries", type=int, default=4, help="most tries of a round that other processes disturb (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of each engine (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="result file (default: benchmarks/results/NAME-DATE.json)")


def common_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, for the result file; a quick run has one round and repeats none."""
    if flags.quick:
        flags.rounds = 1
        flags.tries = 1
    return {
        "quick": flags.quick,
        "rounds": flags.rounds,
        "tries": flags.tries,
        "threads": flags.threads,
        "dtype": flags.dtype,
    }


def result_path(flags: argparse.Namespace, name: str) -> Path | None:
    """A quick run never writes among the results that are quoted."""
    if flags.output is None and flags.quick:
        import tempfile

        return Path(tempfile.gettempdir()) / f"{name}-quick.json"
    path: Path | None = flags.output
    return path


def fastdeploy(model: Path, flags: argparse.Namespace, max_seqs: int, **more: Any) -> EngineProcess:
    """The library's LLM without prefix caching, else at its defaults."""
    settings = {
        "model": str(model),
        "device": "cpu",
        "dtype": flags.dtype,
        "threads": flags.threads,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max_seqs,
        "enable_prefix_caching": False,
        **more,
    }
    return EngineProcess("fastdeploy", "engine_fastdeploy.py", settings, child_environ(flags.threads))


def transformers(model: Path, flags: argparse.Namespace, experts: str = "auto") -> EngineProcess:
    """`generate` at its defaults, with the fastest of its implementations of experts."""
    settings = {"model": str(model), "dtype": flags.dtype, "n_threads": flags.threads, "experts": experts}
    return EngineProcess("transformers", "engine_transformers.py", settings, child_environ(flags.threads))


def vllm(
    name: str, model: Path, flags: argparse.Namespace, max_seqs: int, python: str, eager: bool, more: Mapping[str, str]
) -> EngineProcess:
    """vLLM's LLM without prefix caching; `more` are environment variables (thread binding)."""
    settings = {
        "model": str(model),
        "dtype": flags.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max_seqs,
        "enable_prefix_caching": False,
        "enforce_eager": eager,
        "disable_log_stats": False,  # for the times of the first and last token
    }
    environ = child_environ(flags.threads, {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", **more})
    return EngineProcess(name, "engine_vllm.py", settings, environ, python)


def measure(
    report: Report, workload: Workload, engine: EngineProcess, idle_pids: Sequence[int], **labels: Any
) -> dict[str, Any]:
    """One round on one engine while others idle (`idle_pids`, the roots of their process trees).

    Keeps the raw figures in `report` and returns them with the token ids.
    """
    roots = [engine.pid, *(pid for pid in idle_pids if pid != engine.pid)]
    load = os.getloadavg()[0]
    clock = CpuClock.start(*roots)
    answer = engine.generate(workload.prompts, workload.n_outputs)
    usage = clock.since(*roots)
    wall_s, decode_s = answer["wall_s"], answer["decode_s"]
    figures: dict[str, Any] = {
        **labels,
        "case": workload.name,
        "engine": engine.name,
        "wall_s": round(wall_s, 4),
        "output_tokens": workload.n_output_tokens,
        "output_tokens_per_s": round(workload.n_output_tokens / wall_s, 3),
    }
    if len(workload.prompts) == 1 and decode_s:
        figures["decode_tokens_per_s"] = round((workload.n_output_tokens - 1) / decode_s, 3)
    figures |= {"load_average": round(load, 2), **usage}
    report.add_round(**figures)
    return {**figures, "token_ids": answer["token_ids"]}
