"""How many KV pages fit."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import ConfigError

log = logging.getLogger("fastdeploy.rank")


def free_bytes(device: torch.device) -> int:
    """Memory that could still be taken: of the GPU, or of this host or control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _meminfo_bytes("MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(available, 0)


def total_bytes(device: torch.device) -> int:
    """All memory of the GPU or host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _meminfo_bytes("MemTotal")


def choose_n_pages(config: EngineConfig, page_bytes: int, n_free: int, n_total: int, n_most: int) -> int:
    """Pages to allocate: `--num-gpu-blocks-override`, or what `--gpu-memory-utilization` leaves.

    Of bytes, `n_free` and `n_total` are this rank's share; `n_most` is what a number asked for may take. A CPU never
    takes more than all slots at full length need. Raises ConfigError with bytes and flag when too few fit.
    """
    cache, model = config.cache, config.model
    n_full_length = -(-model.max_model_len // cache.page_tokens) * config.scheduler.max_seqs
    if cache.n_pages is not None:
        n_bytes = cache.n_pages * page_bytes
        taken = f"--num-gpu-blocks-override {cache.n_pages}: these pages take {n_bytes:,} bytes ({page_bytes:,} each)"
        if n_bytes > n_most:
            raise ConfigError(f"{taken}, there are {n_most:,}; at most {n_most // page_bytes} fit")
        if n_bytes > n_free:
            log.warning("%s once all are used, this rank's share of what is free is %s", taken, f"{n_free:,}")
        return cache.n_pages
    budget = int(n_free - n_total * (1 - cache.memory_fraction))
    n_pages = budget // page_bytes
    if model.device == "cpu":
        n_pages = min(n_pages, n_full_length)
    if n_pages < 2:
        raise ConfigError(
            f"--gpu-memory-utilization {cache.memory_fraction}: no memory is left for KV pages: a page takes "
            f"{page_bytes:,} bytes, {n_free:,} of {n_total:,} are free; raise it, or lower --block-size"
        )
    return n_pages


def _meminfo_bytes(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo has no field {field}")
