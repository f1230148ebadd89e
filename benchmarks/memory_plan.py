"""What `fastdeploy check --plan` says of each rank's memory, and what the ranks of a real group take.

    python benchmarks/memory_plan.py

Eight CPU ranks of one model of reduced depth and width, started by multi_api_server with the flags that a group of
eight GPUs would get. Each rank then computes a prompt of almost --max-model-len tokens and short ones, in the largest
steps there may be, which fill every page of its cache.

Compared are the memory that ranks share (weights, buffers of the exchange) and the private memory of each rank, once it
is ready and the most it ever had. A page that nobody has written to takes no memory, so pages count in the latter only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines import result_path
from make_model_folder import parse_flags as model_flags
from make_model_folder import write
from report import Report, figure
from server_group import Member, ServerGroup

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.hardware import memory_bytes
from fastdeploy.config.memory_plan import RankMemory, plan_rank
from fastdeploy.config.resolve import resolve
from fastdeploy.executor.process_memory import bare_rank_bytes, private_bytes

NAME = "memory_plan"
LIMIT_PERCENT = 3.0
SETTLE_S, POLL_S, ANSWER_S = 3.0, 0.05, 7200.0
SHARED_WEIGHTS, SHARED_EXCHANGE = "fastdeploy-weights", "fastdeploy-ranks"
MODEL = "--layers 12 --hidden 1024 --heads 8 --kv-heads 2 --expert-width 512 --dense-width 3584"
QUICK_MODEL = "--layers 4 --dense-layers 1 --hidden 512 --heads 4 --kv-heads 2 --expert-width 256 --dense-width 1536"
SHORT_PROMPT = 1024


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="data-parallel and expert-parallel size (default: %(default)s)")
    add("--model-flags", default=MODEL, help="sizes, as make_model_folder.py takes them (default: %(default)s)")
    add("--max-model-len", type=int, default=12288, help="(default: %(default)s)")
    add("--max-num-seqs", type=int, default=64, help="(default: %(default)s)")
    add("--pages", type=int, default=256, help="--num-gpu-blocks-override (default: %(default)s)")
    add("--output", type=Path, help="(default: benchmarks/results/NAME-DATE.json)")
    add("--quick", action="store_true", help="a smoke check with two small ranks; its figures mean nothing")
    flags = parser.parse_args()
    if flags.quick:
        flags.ranks, flags.model_flags, flags.max_model_len, flags.pages = 2, QUICK_MODEL, 3072, 64
    return flags


class Peak:
    """The most private memory that each process has, looked at in a thread; use it in a `with` block."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self.most_bytes = dict.fromkeys(pids, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(POLL_S):
            for pid in self._pids:
                self.most_bytes[pid] = max(self.most_bytes[pid], resident_bytes(pid))


def resident_bytes(pid: int) -> int:
    """Private memory again, from a file that is fast to read."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def shared_bytes(pids: Sequence[int], name: str) -> int:
    """Memory of the mapping `name` that processes share among themselves alone: the shares of all of them."""
    total_kib, inside = 0, False
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = name in line
            elif inside and line.startswith("Pss:"):
                total_kib += int(line.split()[1])
    return total_kib * 1024


def prompts_of(flags: argparse.Namespace, rank: int, page_tokens: int, vocabulary: int) -> list[list[int]]:
    """Prompts that take all pages: the longest that may be, then short ones; those of ranks differ."""
    randoms = random.Random(rank)
    left = flags.pages * page_tokens
    lengths = [min(flags.max_model_len - 1, left)]
    left -= -(-lengths[0] // page_tokens) * page_tokens
    while left > 0:
        lengths.append(min(SHORT_PROMPT, left))
        left -= lengths[-1]
    return [[randoms.randrange(10, vocabulary) for _ in range(length)] for length in lengths]


def ask(member: Member, prompt: list[int]) -> None:
    """One token for a prompt. Raises URLError when there is none."""
    body = json.dumps({"model": "any", "prompt": prompt, "max_tokens": 1, "temperature": 0.0}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{member.url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        answer = json.load(response)
    if answer["usage"]["completion_tokens"] != 1:
        raise RuntimeError(f"rank {member.data_rank} answered {answer}")


def planned(rank: RankMemory) -> dict[str, int]:
    """Bytes by where they can be seen: private ones when it is ready and at most, and those of the group."""
    own = sum(rank.weights.get(part, 0) for part in ("experts", "routers", "biases"))
    buffers = rank.buffers
    ready = rank.process_bytes + own + buffers["positions"]
    return {
        "ready": ready,
        "peak": ready + rank.kv_bytes + buffers["activations"] + buffers["logits"],
        "shared_weights": rank.weight_bytes - own,
        "exchange": buffers["exchange"],
    }


def percent(plan: float, real: float) -> float:
    """How far the plan is off, above 0 for too much."""
    return round(100 * (plan / real - 1), 2)


def measure(flags: argparse.Namespace, report: Report, folder: Path) -> None:
    """Plan, start, load, compare."""
    sizes = model_flags([str(folder / "model"), *flags.model_flags.split()])
    write(folder / "model", sizes)
    args = {
        "model": str(folder / "model"),
        "load_choices": "dummy",
        "device": "cpu",
        "tensor_parallel_size": 1,
        "data_parallel_size": flags.ranks,
        "max_model_len": flags.max_model_len,
        "max_num_seqs": flags.max_num_seqs,
        "num_gpu_blocks_override": flags.pages,
    }
    words = [word for name, value in args.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    config = resolve(EngineArgs(**args, enable_expert_parallel=True))
    process_bytes, device_bytes = bare_rank_bytes(), memory_bytes() // flags.ranks
    ranks = [plan_rank(config, number, "bfloat16", device_bytes, process_bytes) for number in range(flags.ranks)]
    report.settings |= {
        "server_flags": [*words[2:], "--enable-expert-parallel"],
        "process_bytes": process_bytes,
        "planned_weights": dict(ranks[0].weights),
        "planned_buffers": dict(ranks[0].buffers),
        "planned_pages": {"n": ranks[0].n_pages, "bytes": ranks[0].kv_bytes},
    }
    prompts = [prompts_of(flags, rank, config.cache.page_tokens, sizes.vocab) for rank in range(flags.ranks)]
    with ServerGroup(folder / "run", flags.ranks, [*words, "--enable-expert-parallel"]) as group:
        pids = [member.rank_pids()[0] for member in group.members]
        time.sleep(SETTLE_S)
        ready = [private_bytes(pid) for pid in pids]
        with Peak(pids) as peak, ThreadPoolExecutor(sum(map(len, prompts))) as pool:
            began_s = time.monotonic()
            asked = []
            for member in group.members:
                asked += [pool.submit(ask, member, prompt) for prompt in prompts[member.data_rank]]
            for one in asked:
                one.result()
            report.settings["load_s"] = round(time.monotonic() - began_s, 1)
        real = {
            "ready": ready,
            "peak": [peak.most_bytes[pid] for pid in pids],
            "after": [private_bytes(pid) for pid in pids],
            "shared_weights": [shared_bytes(pids, SHARED_WEIGHTS)],
            "exchange": [shared_bytes(pids, SHARED_EXCHANGE)],
        }
    compare_all(report, [planned(rank) for rank in ranks], real)


def compare_all(report: Report, plans: Sequence[dict[str, int]], real: dict[str, list[int]]) -> None:
    """One round for each rank, one line of the table for each part, which is the rank that is off most."""
    for number, plan in enumerate(plans):
        found: dict[str, Any] = {"rank": number, "after_bytes": real["after"][number]}
        for part in ("ready", "peak"):
            found |= {f"{part}_planned_bytes": plan[part], f"{part}_bytes": real[part][number]}
            found[f"{part}_off_percent"] = percent(plan[part], real[part][number])
        report.add_round(**found)
    for part, what in (("shared_weights", "weights that ranks share"), ("exchange", "buffers of the exchange")):
        plan_bytes, real_bytes = sum(plan[part] for plan in plans), real[part][0]
        report.settings[part] = {"planned_bytes": plan_bytes, "bytes": real_bytes}
        report.summary.append(
            figure(f"{what}: plan off by", "%", [abs(percent(plan_bytes, real_bytes))], LIMIT_PERCENT)
        )
    for part, what in (("ready", "private memory when ready"), ("peak", "private memory at most")):
        worst = max((round_[f"{part}_off_percent"] for round_ in report.rounds), key=abs)
        report.summary.append(figure(f"{what}: plan off by, worst rank", "%", [abs(worst)], LIMIT_PERCENT))


def main() -> None:
    flags = parse_flags()
    settings = {name: value for name, value in vars(flags).items() if name != "output"}
    report = Report(NAME, f"Memory of {flags.ranks} CPU ranks against the plan", settings)
    with tempfile.TemporaryDirectory(prefix="memory-plan-") as folder:
        measure(flags, report, Path(folder))
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
