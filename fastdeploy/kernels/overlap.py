"""Starting a kernel while the one before it ends (programmatic dependent launch, compute capability 9 and later).

A kernel launched with `launch_pdl=True` may begin before its predecessor has finished: until `gdc_wait` it must touch
nothing that another kernel writes, so it sets up addresses or fetches weights. Every program calls `gdc_wait` before it
ends; otherwise the kernel after it could overtake the kernel before it.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on that device may be launched so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
