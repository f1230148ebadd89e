"""DP=N x EP=N as it is served: multi_api_server with N servers, the router in front, load by `fastdeploy bench serve`.

    python benchmarks/ep_serving.py --ranks 4 --quantization block_wise_fp8 --layers 24  # widths of ERNIE-4.5-300B-A47B
    python benchmarks/ep_serving.py --quick                                              # two CPU ranks, a tiny model

Weights are random and made by each rank for itself, so that no checkpoint is needed. Per load: tokens per second for
each rank, latencies, how evenly the ranks were loaded (mean over largest, of the tokens done and of the requests held),
and beside the median time per output token the floor: reading each weight that a decode step needs once, at
--bandwidth. What the exchange between GPUs takes is measured by all_to_all.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import result_path
from make_model_folder import SIZES, write
from make_model_folder import parse_flags as model_flags
from report import Report, figure
from server_group import Member, ServerGroup
from synthetic_fleet import metrics_of

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.hardware import cuda_devices
from fastdeploy.config.memory_plan import RankMemory, plan_rank
from fastdeploy.config.resolve import resolve

NAME = "ep_serving"
POLL_S = 0.5
BENCH_TIMEOUT_S = 3600.0
TINY = "--layers 4 --dense-layers 1 --hidden 256 --heads 4 --kv-heads 2 --head-dim 64 --dense-width 768 --vocab 2048"
TINY += " --expert-width 128 --experts 16 --experts-per-token 4"
QUICK_LOADS = "8x32x16,4x256x1"


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="data-parallel and expert-parallel size (default: %(default)s)")
    add("--loads", default="256x128x512,512x1024x128,128x4096x1", help="requests x input x output, with commas")
    add("--repeat", type=int, default=2, help="runs of each load, the last one counts (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--quantization", help="as the server's flag")
    add("--max-num-seqs", type=int, default=64, help="of each rank (default: %(default)s)")
    add("--max-model-len", type=int, default=12288, help="(default: %(default)s)")
    add("--pages", type=int, help="KV pages of each rank (default: what fits)")
    add(
        "--bandwidth",
        type=float,
        default=4.3,
        help="of the device's memory, TB/s, for the floor (default: %(default)s)",
    )
    add("--start-timeout", type=float, default=540.0, help="seconds until all are ready (default: %(default)s)")
    add("--server-flags", default="", help="further flags of the servers, in one string")
    add("--output", type=Path, help="(default: benchmarks/results/NAME-DATE.json)")
    add("--quick", action="store_true", help="a smoke check on the CPU; its figures mean nothing")
    for flag, key, _ in SIZES:
        add(f"--{flag}", type=int, help=f"{key} (default: that of ERNIE-4.5-300B-A47B)")
    flags = parser.parse_args()
    if flags.quick:
        flags.loads, flags.device, flags.repeat = QUICK_LOADS, "cpu", 1
        flags.max_num_seqs, flags.max_model_len, flags.pages = 8, 512, 64
    return flags


def sizes_of(flags: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """Flags of make_model_folder.py for the folder: those given here, and published or tiny ones."""
    given = [(flag, getattr(flags, flag.replace("-", "_"))) for flag, _, _ in SIZES]
    words = [word for flag, value in given if value is not None for word in (f"--{flag}", str(value))]
    return model_flags([str(folder), *(TINY.split() if flags.quick else []), *words])


def engine_args(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The servers' flags, by their names in EngineArgs."""
    wanted = {
        "model": str(folder),
        "load_choices": "dummy",
        "device": flags.device,
        "tensor_parallel_size": 1,
        "data_parallel_size": flags.ranks,
        "enable_expert_parallel": True,
        "max_model_len": flags.max_model_len,
        "max_num_seqs": flags.max_num_seqs,
        "num_gpu_blocks_override": flags.pages,
        "quantization": flags.quantization,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def command_line(args: dict[str, Any]) -> list[str]:
    """The same as words."""
    words = []
    for name, value in args.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


@dataclass
class Watch:
    """Looks at the servers while they are under load, in a thread; use it in a `with` block."""

    members: Sequence[Member]
    held: list[list[float]] = field(default_factory=list)  # requests of each rank, at each look

    def __enter__(self) -> Watch:
        self._before = self._tokens()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.tokens = [after - before for after, before in zip(self._tokens(), self._before, strict=True)]

    def balance(self) -> dict[str, float]:
        """Mean over largest, 1 is even: of the tokens that each rank did, and of the requests it held on average."""
        rows = [row for row in self.held if sum(row)]
        found = {"balance_tokens": _mean_over_largest(self.tokens)}
        if rows:
            found["balance_requests"] = _mean_over_largest(
                [statistics.mean(column) for column in zip(*rows, strict=True)]
            )
            found["requests_running"] = statistics.mean(sum(row) for row in rows)
        return found

    def _tokens(self) -> list[float]:
        names = ("prompt_tokens_total", "generation_tokens_total")
        return [sum(self._metrics(member).get(f"fastdeploy:{name}", 0.0) for name in names) for member in self.members]

    def _look(self) -> None:
        while not self._stop.wait(POLL_S):
            pages = [self._metrics(member) for member in self.members]
            self.held.append([page.get("fastdeploy:num_requests_running", 0.0) for page in pages])

    def _metrics(self, member: Member) -> dict[str, float]:
        return metrics_of(member.metrics_url)


def _mean_over_largest(values: Sequence[float]) -> float:
    return statistics.mean(values) / max(values) if max(values, default=0.0) > 0 else 1.0


def run_load(url: str, load: str, vocabulary: int, seed: int) -> dict[str, Any]:
    """Figures of `fastdeploy bench serve` for REQUESTSxINPUTxOUTPUT. Raises RuntimeError when requests fail."""
    n_requests, n_input, n_output = load.split("x")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "load.json"
        command = [sys.executable, "-m", "fastdeploy.entrypoints.cli", "bench", "serve", "--base-url", url]
        command += ["--requests", n_requests, "--input-len", n_input, "--output-len", n_output]
        command += ["--vocab-size", str(vocabulary), "--workload-seed", str(seed), "--no-progress"]
        command += ["--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BENCH_TIMEOUT_S)
        if done.returncode or not output.exists():
            raise RuntimeError(f"{load}: bench serve ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        result: dict[str, Any] = json.loads(output.read_text())["results"][0]
    if result["n_failed"] or result["n_wrong_length"]:
        raise RuntimeError(f"{load}: {result['n_failed']} requests failed: {result['errors']}")
    return result


def floor_ms(rank: RankMemory, quantization: str | None, bandwidth_tb_s: float) -> float:
    """Milliseconds to read what a decode step of many rows reads of the weights: all but the embedding's table."""
    linear = rank.weights["attention"] + rank.weights["dense layers"]
    if quantization == "block_wise_fp8":  # held in both forms, of which few rows take the one of 16 bits
        linear = linear * 2 // 3
    n_bytes = linear + sum(rank.weights.get(part, 0) for part in ("head", "experts", "shared experts", "routers"))
    return n_bytes / (bandwidth_tb_s * 1e12) * 1e3


def measure(flags: argparse.Namespace, report: Report, folder: Path) -> None:
    """Start, load, note."""
    sizes = sizes_of(flags, folder / "model")
    write(folder / "model", sizes)
    args = engine_args(flags, folder / "model")
    config = resolve(EngineArgs(**args))
    on_gpu = config.model.device == "cuda"
    devices = cuda_devices()
    rank = plan_rank(config, 0, "bfloat16", devices[0].memory_bytes if on_gpu else 0)
    step_floor_ms = floor_ms(rank, flags.quantization, flags.bandwidth) if on_gpu else None
    report.settings |= {
        "model": {key: getattr(sizes, flag.replace("-", "_")) for flag, key, _ in SIZES},
        "device": devices[0].name if on_gpu else "cpu",
        "planned_bytes": {"weights": rank.weight_bytes, "pages": rank.kv_bytes, "buffers": rank.buffer_bytes},
        "step_floor_ms": step_floor_ms,
    }
    words = [*command_line(args), *flags.server_flags.split()]
    with ServerGroup(folder / "run", flags.ranks, words, with_router=True, start_s=flags.start_timeout) as group:
        assert group.router is not None
        report.add_round(start_to_ready_s=group.start_s)
        report.summary.append(figure(f"start to ready, {flags.ranks} ranks", "s", [group.start_s]))
        if (n_known := group.router.n_servers()) != flags.ranks:
            raise RuntimeError(f"the router knows {n_known} of {flags.ranks} servers")
        for load in flags.loads.split(","):
            for i in range(flags.repeat):
                with Watch(group.members) as watch:
                    result = run_load(group.router.url, load, sizes.vocab, seed=i)
                round_ = describe(load, i, result, watch, flags.ranks, step_floor_ms)
                report.add_round(**round_)
            summarise(report, load, round_)


def describe(
    load: str, i: int, result: dict[str, Any], watch: Watch, n_ranks: int, step_floor_ms: float | None
) -> dict[str, Any]:
    """One run of one load."""
    found = {
        "load": load,
        "round": i,
        "seconds": result["seconds"],
        "output_tokens_per_s_per_rank": result["output_tokens_per_s"] / n_ranks,
        "input_tokens_per_s_per_rank": result["input_tokens_per_s"] / n_ranks,
        **watch.balance(),
        **{name: result[name] for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")},
        "client_core_share": result["client_core_share"],
        "tokens_of_ranks": watch.tokens,
    }
    if step_floor_ms and result["tpot_ms"]:
        found["tpot_over_floor"] = result["tpot_ms"]["p50"] / step_floor_ms
    return found


def summarise(report: Report, load: str, last: dict[str, Any]) -> None:
    """Rows of the table for the run that counts."""
    n_output = int(load.split("x")[2])
    what = "output_tokens_per_s_per_rank" if n_output > 1 else "input_tokens_per_s_per_rank"
    for unit, name in (("tokens/s", what), ("mean/largest", "balance_tokens"), ("ratio", "tpot_over_floor")):
        if name in last:
            report.summary.append(figure(f"{load}: {name.replace('_', ' ')}", unit, [last[name]]))
    if last["tpot_ms"]:
        report.summary.append(figure(f"{load}: time per output token, median", "ms", [last["tpot_ms"]["p50"]]))
    report.summary.append(figure(f"{load}: time to first token, median", "ms", [last["ttft_ms"]["p50"]]))


def main() -> None:
    flags = parse_flags()
    settings = {name: value for name, value in vars(flags).items() if name != "output" and value is not None}
    report = Report(NAME, f"DP={flags.ranks} x EP={flags.ranks} behind the router", settings)
    with tempfile.TemporaryDirectory(prefix="ep-serving-") as folder:
        measure(flags, report, Path(folder))
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
