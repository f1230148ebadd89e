"""What a group of data-parallel ranks with expert parallelism costs when nobody asks anything: start, CPU, memory.

    python benchmarks/dp_idle.py --data 8

Prints JSON. Memory is PSS (a page that n processes share counts 1/n in each) of the whole process tree, interpreters
and libraries included. It is compared with what the weights must take: experts once, as they are spread over the ranks,
and everything else once per rank. `ratio` takes all weights in the type that is computed in, `ratio_to_held` in the 16
bits of the checkpoint, which is how they are held. What ranks have in common lies in memory once: both may be below 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from cpu_startup_memory import CACHE, DTYPE_BYTES, UNITS, WEIGHTS
from engine_process import child_environ
from machine import cpu_s, hardware, process_tree
from report import own_versions, shown_command
from server_process import ServerProcess

from fastdeploy.demo.model import build_demo_model

CPU_LIMIT, START_LIMIT_S, MEMORY_LIMIT = 0.03, 60.0, 1.3
SETTLE_S = 3.0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=8, help="data-parallel size (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="(default: the demo model with experts)")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of looking at the idle group (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    return parser.parse_args()


def bytes_of_weights(model: Path, dtype: str) -> tuple[int, int]:
    """Bytes of all routed experts, and of everything else, in `dtype`."""
    n_expert = n_other = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            n = math.prod(tensor["shape"])
            if ".experts." in name:
                n_expert += n
            else:
                n_other += n
    return n_expert * DTYPE_BYTES[dtype], n_other * DTYPE_BYTES[dtype]


def memory_of(pid: int) -> dict[str, object]:
    """What a process is, and its PSS in bytes."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    module = next((a for a in arguments if a.startswith("fastdeploy.")), arguments[0])
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return {"module": module, "pss_bytes": int(found[1]) * 1024 if found else 0}


def reported_bytes(pattern: re.Pattern[str], log: str) -> float:
    """A size that the server tells when it is ready. Raises RuntimeError when it is not there."""
    found = pattern.search(log)
    if found is None:
        raise RuntimeError(f"the server's log does not tell weights and cache:\n{log[-2000:]}")
    return float(found[1]) * UNITS[found[2]]


def measure(flags: argparse.Namespace) -> dict[str, object]:
    """Start, wait, look."""
    model = flags.model or build_demo_model(form="moe")
    command = ["--model", str(model), "--device", "cpu", "--dtype", flags.dtype, "--max-model-len", "512"]
    command += ["--num-gpu-blocks-override", "64", "--data-parallel-size", str(flags.data), "--enable-expert-parallel"]
    load_average = os.getloadavg()[0]
    with ServerProcess(command, child_environ(1), timeout_s=600.0) as server:
        time.sleep(SETTLE_S)
        began_s, before_s = time.monotonic(), cpu_s(server.pid)
        time.sleep(flags.seconds)
        cpu_share = (cpu_s(server.pid) - before_s) / (time.monotonic() - began_s)
        processes = [memory_of(pid) for pid in process_tree(server.pid)]
        start_s, log = server.start_s, server.log
    expert_bytes, other_bytes = bytes_of_weights(model, flags.dtype)
    least_bytes = expert_bytes + flags.data * other_bytes
    pss_bytes = sum(int(str(process["pss_bytes"])) for process in processes)
    expert_held_bytes, other_held_bytes = bytes_of_weights(model, "bfloat16")
    held_bytes = expert_held_bytes + flags.data * other_held_bytes
    return {
        "data_parallel_size": flags.data,
        "load_average_at_start": round(load_average, 2),
        "start_s": round(start_s, 2),
        "start_limit_s": START_LIMIT_S,
        "idle_cpu_share_of_a_core": round(cpu_share, 4),
        "idle_cpu_limit": CPU_LIMIT,
        "expert_bytes": expert_bytes,
        "replicated_bytes": other_bytes,
        "least_bytes": least_bytes,
        "least_held_bytes": held_bytes,
        "reported_weight_bytes": round(reported_bytes(WEIGHTS, log)),
        "reported_kv_bytes": round(reported_bytes(CACHE, log)),
        "pss_bytes": pss_bytes,
        "ratio": round(pss_bytes / least_bytes, 3),
        "ratio_to_held": round(pss_bytes / held_bytes, 3),
        "memory_limit": MEMORY_LIMIT,
        "processes": processes,
    }


def main() -> int:
    flags = parse_flags()
    found = {
        "benchmark": "dp_idle",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": own_versions(),
        "command": shown_command(sys.argv),
        **measure(flags),
    }
    text = json.dumps(found, indent=1, default=str)
    print(text)
    if flags.output:
        flags.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
