"""Start-up and memory of a group of data-parallel ranks with expert parallelism on one machine.

    python benchmarks/dp_memory.py --data 8

The limit for memory: 1.3 times the weights that the ranks use, experts counted once and everything else once for each
rank, in the 16 bits that are held. Memory is PSS of the whole process tree after requests to all ranks, with KV pages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from pathlib import Path

from engine_process import child_environ
from engines import add_common_flags, common_settings, result_path
from machine import CpuClock, tree_memory_bytes
from report import Report, figure
from server_process import HOST, ServerProcess
from sse_client import stream_all
from workload import PromptMaker

from fastdeploy.config.model_shape import read_model_shape
from fastdeploy.demo.model import build_demo_model

NAME = "dp_memory"
START_LIMIT_S, MEMORY_LIMIT, IDLE_LIMIT = 60.0, 1.3, 0.03
HELD_BYTES = 2
IDLE_S = 20


def weight_bytes(model: Path) -> tuple[int, int]:
    """(of the experts, of everything else); a tied head is held a second time, in panels."""
    experts = others = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                n_bytes = math.prod(tensor["shape"]) * HELD_BYTES
                if ".experts." in name:
                    experts += n_bytes
                else:
                    others += n_bytes
    shape = read_model_shape(model)
    return experts, others + shape.tied_embeddings * shape.vocab_size * shape.hidden_size * HELD_BYTES


async def idle_share(pid: int) -> float:
    """Share of one core that an idle tree takes."""
    clock = CpuClock.start(pid)
    await asyncio.sleep(IDLE_S)
    return clock.since(pid)["measured_cpu_s"] / IDLE_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, default_rounds=3)
    parser.add_argument("--data", type=int, default=8, help="data-parallel size (default: %(default)s)")
    flags = parser.parse_args()
    report = Report(NAME, f"DP={flags.data} with expert parallelism", common_settings(flags) | {"data": flags.data})
    model = build_demo_model(form="moe")
    experts, others = weight_bytes(model)
    allowed = experts + flags.data * others
    report.settings |= {"expert_weight_bytes": experts, "other_weight_bytes": others, "used_by_all_ranks": allowed}
    workload = PromptMaker(model).mixed("mixed", 4 * flags.data, (16, 64), (4, 16))
    command = ["--model", str(model), "--device", "cpu", "--dtype", flags.dtype, "--threads", "1"]
    command += ["--data-parallel-size", str(flags.data), "--enable-expert-parallel"]
    starts_s, ratios, mib, idle = [], [], [], []
    for i in range(flags.rounds):
        with ServerProcess(command, child_environ(1)) as server:
            asyncio.run(stream_all(HOST, server.port, workload))
            memory = tree_memory_bytes(server.pid)
            idle.append(asyncio.run(idle_share(server.pid)))
        starts_s.append(server.start_s)
        ratios.append(memory["pss"] / allowed)
        mib.append(memory["pss"] / 2**20)
        report.add_round(round=i, start_s=round(server.start_s, 2), idle_share=round(idle[-1], 4), **memory)
    report.summary.append(figure("api_server start to /health 200", "s", starts_s, START_LIMIT_S))
    report.summary.append(figure("PSS of the process tree after serving", "MiB", mib))
    report.summary.append(figure("PSS over (experts + ranks x other weights)", "ratio", ratios, MEMORY_LIMIT))
    report.summary.append(figure("idle CPU", "cores", idle, IDLE_LIMIT))
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
