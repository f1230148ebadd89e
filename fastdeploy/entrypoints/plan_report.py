"""`fastdeploy check --plan`: the memory of each rank as a table, for this machine or for GPUs that are elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.hardware import CudaDevice, cuda_devices, memory_bytes
from fastdeploy.config.memory_plan import CUDA_CONTEXT_BYTES, RankMemory, plan_rank
from fastdeploy.config.model_shape import checkpoint_dtype
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import EngineConfig
from fastdeploy.distributed import topology
from fastdeploy.errors import ConfigError
from fastdeploy.executor.process_memory import bare_rank_bytes

HERE = "here"
_GIB = 1 << 30
# As the driver reports them.
GPUS: Mapping[str, int] = MappingProxyType({"h100": 81559 << 20, "h200": 143771 << 20, "b200": 183359 << 20})


def plan_report(args: EngineArgs, kind: str) -> str:
    """The plan for these flags on GPUs of `kind`, or on this machine. Raises ConfigError when something contradicts.

    On a CPU the process of a rank is started once, without a model, to see what it takes.
    """
    devices = cuda_devices() if kind == HERE else _imagined(kind, args)
    if kind != HERE:
        args = replace(args, device="cuda")
    config = resolve(args, devices=devices)
    if config.model.synthetic is not None:
        raise ConfigError("--plan: a synthetic server has no weights and no pages in memory; there is nothing to plan")
    stored = checkpoint_dtype(Path(config.model.path))
    device_bytes = _device_bytes(config, devices)
    process_bytes = bare_rank_bytes() if config.model.device == "cpu" else 0
    numbers = range(config.parallel.n_ranks)
    ranks = [plan_rank(config, number, stored, device_bytes, process_bytes) for number in numbers]
    return "\n".join([_head(config, kind, device_bytes), *_tables(ranks), _verdict(config, ranks)])


def _imagined(kind: str, args: EngineArgs) -> tuple[CudaDevice, ...]:
    """As many such GPUs as the ranks of one machine."""
    written = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gi?b?", kind.lower())
    if kind.lower() not in GPUS and not written:
        raise ConfigError(f"--plan {kind}: must be {', '.join(GPUS)}, or a GPU's memory, as in 80GiB")
    n_bytes = int(float(written[1]) * _GIB) if written else GPUS[kind.lower()]
    n_devices = max(args.tensor_parallel_size * args.data_parallel_size, 1)
    return (CudaDevice(kind, n_bytes, (9, 0)),) * n_devices


def _device_bytes(config: EngineConfig, devices: tuple[CudaDevice, ...]) -> int:
    if config.model.device == "cuda":
        return min(device.memory_bytes for device in devices)
    return memory_bytes() // topology.ranks_per_host(config.parallel)


def _head(config: EngineConfig, kind: str, device_bytes: int) -> str:
    parallel, where = config.parallel, "a GPU" if config.model.device == "cuda" else "its share of this machine"
    experts = ", experts over all of them" if parallel.expert and parallel.n_ranks > 1 else ""
    return (
        f"{config.model.shape.architecture} in {config.model.dtype}: {parallel.n_ranks} ranks (data {parallel.data} x "
        f"tensor {parallel.tensor}{experts}), each with {device_bytes / _GIB:.1f} GiB ({where}"
        f"{'' if kind == HERE else f', {kind}'})"
    )


def _tables(ranks: list[RankMemory]) -> list[str]:
    """One table for each run of ranks that are alike."""
    lines, first = [], 0
    for i in range(1, len(ranks) + 1):
        if i < len(ranks) and replace(ranks[i], number=ranks[first].number) == ranks[first]:
            continue
        name = f"rank {first}" if i - first == 1 else f"ranks {first} to {i - 1}, each"
        lines += ["", f"{name}:", *_rows(ranks[first])]
        first = i
    return lines


def _rows(rank: RankMemory) -> list[str]:
    pages = f"{rank.n_pages:,} KV pages of {rank.page_bytes:,} bytes"
    entries = [("process: Python and torch, measured", rank.process_bytes)] if rank.process_bytes else []
    entries += [(f"weights: {name}", n_bytes) for name, n_bytes in rank.weights.items() if n_bytes]
    own = "weights of its own (the others are those of the first rank here)" if rank.borrowed else "weights"
    entries += [(own, rank.weight_bytes), (pages, rank.kv_bytes)]
    entries += [(f"buffers: {name}", n_bytes) for name, n_bytes in rank.buffers.items() if n_bytes]
    entries += [("buffers, at most", rank.buffer_bytes), ("all", rank.total_bytes)]
    width = max(len(name) for name, _ in entries)
    return [f"  {name:<{width}}  {n_bytes / _GIB:9.3f} GiB" for name, n_bytes in entries]


def _verdict(config: EngineConfig, ranks: list[RankMemory]) -> str:
    on_gpu, tokens = config.model.device == "cuda", config.cache.page_tokens
    fullest = max(ranks, key=lambda rank: rank.total_bytes)
    n_tokens = min(rank.n_pages for rank in ranks) * tokens
    beside = f" beside the CUDA context ({CUDA_CONTEXT_BYTES / _GIB:.1f} GiB)" if on_gpu else ""
    needed = fullest.total_bytes + (CUDA_CONTEXT_BYTES if on_gpu else 0)
    if needed > fullest.device_bytes or not fullest.n_pages:
        least = fullest.weight_bytes + fullest.buffer_bytes + 2 * fullest.page_bytes
        return (
            f"\ndoes not fit: rank {fullest.number} needs {max(needed, least) / _GIB:.1f} GiB{beside}, its device has "
            f"{fullest.device_bytes / _GIB:.1f}; use more ranks, fewer pages, or --quantization wint8"
        )
    n_full = n_tokens // config.model.max_model_len
    return (
        f"\nfits{beside}: {n_tokens:,} tokens of KV cache for each data parallel rank, {n_full:,} requests of full "
        f"length ({config.model.max_model_len:,}), --max-num-seqs {config.scheduler.max_seqs}"
    )
