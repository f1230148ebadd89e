"""Small arrays on their way between host and device without anybody waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 4  # int32s


@dataclass(frozen=True, slots=True)
class Packed:
    """Several int32 arrays in one copy to the device; `parts` are views of it in the shapes sent."""

    parts: tuple[Tensor, ...]

    @classmethod
    def send(cls, arrays: Sequence[NDArray[np.integer]], device: torch.device) -> Packed:
        """Start the copy. Values must fit int32; on the CPU the parts are plain copies."""
        # Parts begin at 16 bytes, as a kernel is compiled anew for pointers that do not.
        begins = [0, *accumulate(-(-array.size // _ALIGNED) * _ALIGNED for array in arrays)]
        n_total = begins.pop()
        staged = torch.empty(n_total, dtype=torch.int32, pin_memory=device.type == "cuda")
        flat = staged.numpy()
        for array, begin in zip(arrays, begins, strict=True):
            flat[begin : begin + array.size] = array.reshape(-1)
        # The pinned allocator gives the memory out again only when the copy has been made.
        sent = staged.to(device, non_blocking=True)
        parts = (sent[begin : begin + array.size] for array, begin in zip(arrays, begins, strict=True))
        return cls(tuple(part.view(array.shape) for part, array in zip(parts, arrays, strict=True)))


class Arriving:
    """A device tensor on its way to the host; the copy starts at once, behind the work queued before it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> Tensor:
        """Wait for it."""
        self._arrived.synchronize()
        return self._host
