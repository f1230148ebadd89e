"""What Linux tells about this machine and about process trees: hardware, CPU time, memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def hardware() -> dict[str, object]:
    """CPU model, cores, memory, instruction sets that matter for matrix products."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    info = {name.strip(): value.strip() for name, _, value in lines}
    flags = set(info.get("flags", "").split())
    kinds = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "cpu": info.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instruction_sets": [kind for kind in kinds if kind in flags],
    }


def process_tree(root: int) -> list[int]:
    """`root` and all its descendants that live."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name (state, parent, ...); empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_s(root: int) -> float:
    """CPU seconds that the living processes of a tree have used, their reaped children included."""
    total = 0
    for pid in process_tree(root):
        fields = _stat(pid)
        total += sum(map(int, fields[11:15])) if fields else 0
    return total / _TICKS_PER_S


@dataclass(frozen=True, slots=True)
class CpuClock:
    """Who used the CPUs between two looks: `start` and then `since`."""

    wall_s: float
    busy_s: float
    steal_s: float
    tree_s: tuple[float, ...]

    @staticmethod
    def start(*roots: int) -> CpuClock:
        """Look now at the machine and at the trees of `roots`."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq) / _TICKS_PER_S
        return CpuClock(time.perf_counter(), busy, steal / _TICKS_PER_S, tuple(cpu_s(root) for root in roots))

    def since(self, *roots: int) -> dict[str, float]:
        """CPU seconds since then: of the first tree (measured), of the other trees (idle), of the rest (foreign)."""
        now = CpuClock.start(*roots)
        measured, *idle = [b - a for a, b in zip(self.tree_s, now.tree_s, strict=True)]
        foreign = now.busy_s - self.busy_s - measured - sum(idle)
        figures = {
            "measured_cpu_s": measured,
            "idle_engines_cpu_s": sum(idle),
            "foreign_cpu_s": max(foreign, 0.0),
            "steal_s": now.steal_s - self.steal_s,
        }
        return {name: round(value, 2) for name, value in figures.items()}


def tree_memory_bytes(root: int) -> dict[str, int]:
    """Resident memory of a tree: `pss` counts pages shared by n processes as 1/n each, `rss` counts them n times."""
    total = {"pss": 0, "rss": 0, "pss_anon": 0, "n_processes": 0}
    for pid in process_tree(root):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        values = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in text.splitlines()[1:])}
        total["pss"] += values["Pss"] * 1024
        total["rss"] += values["Rss"] * 1024
        total["pss_anon"] += values["Pss_Anon"] * 1024
        total["n_processes"] += 1
    return total
