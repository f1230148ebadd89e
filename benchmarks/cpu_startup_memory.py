"""How fast `fastdeploy` imports, explains itself and starts serving, and how much memory a server takes, on a CPU.

    python benchmarks/cpu_startup_memory.py

Files are in the page cache and byte code is compiled when the timed runs begin: one run before them is not counted.
Memory is that of the whole process tree: PSS (a page that n processes share counts 1/n in each) and RSS (counts it n
times). It is compared with the parameters of the checkpoint in the type the server computes in, plus the KV pages that
the server reports.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from engine_process import child_environ
from engines import add_common_flags, common_settings, result_path
from machine import tree_memory_bytes
from report import Report, figure
from server_process import HOST, ServerProcess
from sse_client import stream_all
from workload import PromptMaker

from fastdeploy.demo.model import build_demo_model

NAME = "cpu_startup_memory"
IMPORT_LIMIT_S, HELP_LIMIT_S, START_LIMIT_S = 0.3, 1.0, 15.0
MEMORY_LIMIT = 1.6
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
N_REQUESTS = 16
IMPORT_CODE = "import time; start = time.perf_counter(); import fastdeploy; print(time.perf_counter() - start)"
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
WEIGHTS = re.compile(r"weights ([\d.]+) (B|KiB|MiB|GiB),")
CACHE = re.compile(r"cache ([\d.]+) (B|KiB|MiB|GiB): (\d+) pages of (\d+) tokens")


class Reported(NamedTuple):
    """What a server says about its memory when it is ready."""

    weight_bytes: float
    kv_bytes: float
    n_pages: int
    page_tokens: int

    @staticmethod
    def of(log: str) -> Reported:
        """From the closing lines of start-up. Raises RuntimeError when they are not there."""
        weights, cache = WEIGHTS.search(log), CACHE.search(log)
        if weights is None or cache is None:
            raise RuntimeError(f"the server's log does not tell weights and cache:\n{log[-2000:]}")
        return Reported(
            float(weights[1]) * UNITS[weights[2]], float(cache[1]) * UNITS[cache[2]], int(cache[3]), int(cache[4])
        )


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, default_rounds=5)
    parser.add_argument("--form", choices=("moe", "dense"), default="moe", help="(default: %(default)s)")
    parser.add_argument("--server-flags", nargs=argparse.REMAINDER, default=[], help="further flags of the server")
    return parser.parse_args()


def run_timed(command: Sequence[str], environ: Mapping[str, str]) -> tuple[float, str]:
    """Wall seconds of a command and its output; raises CalledProcessError when it fails."""
    start_s = time.perf_counter()
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=True, timeout=120)
    return time.perf_counter() - start_s, done.stdout


def time_commands(report: Report, n_rounds: int, environ: Mapping[str, str]) -> None:
    """`import fastdeploy`, and `--help`; interpreter start-up counts in the second only."""
    help_command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", "--help"]
    imports_s, helps_s = [], []
    for i in range(-1, n_rounds):
        import_wall_s, printed = run_timed([sys.executable, "-c", IMPORT_CODE], environ)
        help_wall_s, _ = run_timed(help_command, environ)
        if i < 0:
            continue  # fills caches
        imports_s.append(float(printed))
        helps_s.append(help_wall_s)
        figures = {"import_s": imports_s[-1], "import_process_s": import_wall_s, "help_s": help_wall_s}
        report.add_round(round=i, **{name: round(value, 4) for name, value in figures.items()})
    report.summary.append(figure("import fastdeploy", "s", imports_s, IMPORT_LIMIT_S))
    report.summary.append(figure("api_server --help, whole process", "s", helps_s, HELP_LIMIT_S))


def serve_and_weigh(report: Report, flags: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Start the server, serve requests, look at its memory; one round more than is counted for the start."""
    model = build_demo_model(form=flags.form)
    prompt, output = ((16, 64), (4, 16)) if flags.quick else ((16, 256), (16, 128))
    workload = PromptMaker(model).mixed("mixed", N_REQUESTS, prompt, output)
    report.settings["workload"] = workload.describe()
    command = ["--model", str(model), "--device", "cpu", "--dtype", flags.dtype, "--threads", str(flags.threads)]
    weight_bytes = checkpoint_bytes(model, flags.dtype)
    starts_s, ratios, overheads_mib = [], [], []
    for i in range(0 if flags.quick else -1, flags.rounds):
        with ServerProcess([*command, *flags.server_flags], environ) as server:
            ready = tree_memory_bytes(server.pid)
            if i < 0:
                continue  # fills the page cache
            asyncio.run(stream_all(HOST, server.port, workload))
            reported = Reported.of(server.log)
            served = tree_memory_bytes(server.pid)
        kept_bytes = weight_bytes + reported.kv_bytes
        starts_s.append(server.start_s)
        ratios.append(served["pss"] / kept_bytes)
        overheads_mib.append((served["pss"] - kept_bytes) / 2**20)
        figures = {f"{key}_after_serving": value for key, value in served.items()}
        figures |= {f"{key}_when_ready": value for key, value in ready.items()}
        report.add_round(round=i, start_s=round(server.start_s, 3), **reported._asdict(), **figures)
    report.summary.append(figure("api_server start to /health 200", "s", starts_s, START_LIMIT_S))
    mib = [r["pss_after_serving"] / 2**20 for r in report.rounds if "pss_after_serving" in r]
    report.summary.append(figure(f"PSS of the process tree after {N_REQUESTS} requests", "MiB", mib))
    rss = [r["rss_after_serving"] / 2**20 for r in report.rounds if "rss_after_serving" in r]
    report.summary.append(figure(f"RSS of the process tree after {N_REQUESTS} requests", "MiB", rss))
    report.summary.append(figure("PSS over weights + KV pages", "ratio", ratios, MEMORY_LIMIT))
    report.summary.append(figure("PSS beyond weights and KV pages", "MiB", overheads_mib))
    report.settings["checkpoint_weight_bytes"] = weight_bytes
    report.notes.append(
        f"weights {weight_bytes / 2**20:.1f} MiB (the server itself says {reported.weight_bytes / 2**20:.1f}); "
        f"KV cache {reported.kv_bytes / 2**20:.1f} MiB in {reported.n_pages} pages of {reported.page_tokens} tokens"
    )


def checkpoint_bytes(model: Path, dtype: str) -> int:
    """Parameters of the checkpoint times the size of `dtype`."""
    n_parameters = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        n_parameters += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return n_parameters * DTYPE_BYTES[dtype]


def main() -> None:
    flags = parse_flags()
    settings = common_settings(flags) | {"form": flags.form, "server_flags": flags.server_flags}
    report = Report(NAME, "Start-up and memory on a CPU", settings)
    environ = child_environ(flags.threads)
    time_commands(report, 2 if flags.quick else max(flags.rounds, 7), environ)
    serve_and_weigh(report, flags, environ)
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
