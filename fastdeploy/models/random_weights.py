"""Random weights without a checkpoint, of which every rank makes its own share on its own device.

An element depends on the seed, the name of its tensor and its place in the whole tensor, through integer arithmetic
alone. So it is the same on every device and however ranks cut the tensor, and nobody makes more than he keeps.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Of one tensor at a time; on a CPU its scratch space stays in the second-level cache.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 15, 1 << 24
# SplitMix64 (Steele, Lea and Flood, 2014), in signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FACTORS, _SHIFTS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64), (30, 27)
_LAST_SHIFT = 31
_LANES = 0x0000FFFF0000FFFF
_MEAN, _DEVIATION = 2 * 65535, 2 * math.sqrt((2**32 - 1) / 12)  # of the sum of four numbers of 16 bits


class RandomWeights:
    """`--load-choices dummy`: matrices close to normal(0, 0.02), norms of one, biases of zero, in `dtype` on `device`.

    Random rather than constant: with constant weights every token picks the same experts, and any engine looks faster
    than it is.
    """

    def __init__(
        self,
        n_layers: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        self._out_scale = 1 / math.sqrt(2 * n_layers)
        self._seed = seed
        self._dtype = dtype
        # Threads that read have a current GPU of their own.
        needs_index = device.type == "cuda" and device.index is None
        self._device = torch.device("cuda", torch.cuda.current_device()) if needs_index else device

    def require(self, name: str, shape: tuple[int, ...]) -> _RandomTensor:
        """Random numbers for the tensor `name`."""
        if len(shape) == 1:
            return _RandomTensor(shape, None, 1.0 if name.endswith("norm.weight") else 0.0, self._dtype, self._device)
        scale = 0.02 * (self._out_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        return _RandomTensor(shape, int.from_bytes(digest, "little", signed=True), scale, self._dtype, self._device)


@dataclass(frozen=True, slots=True)
class _RandomTensor:
    """Implements StoredTensor. `key` None: every element is `scale`."""

    shape: tuple[int, ...]
    key: int | None
    scale: float
    dtype: torch.dtype
    device: torch.device

    def as_fp8(self) -> None:
        """Random numbers are in no such form."""

    @torch.inference_mode()
    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        cuts = [part or slice(None) for part in (rows, columns)[: len(self.shape)]]
        begins, ends, _ = zip(*(cut.indices(n) for cut, n in zip(cuts, self.shape, strict=True)), strict=True)
        sizes = [max(end - begin, 0) for begin, end in zip(begins, ends, strict=True)]
        if self.key is None:
            return torch.full(sizes, self.scale, dtype=self.dtype, device=self.device)
        out_RC = torch.empty(sizes, dtype=self.dtype, device=self.device)
        # The number of an element in the whole tensor, times the step of SplitMix64; products wrap around.
        row_R = (torch.arange(begins[0], ends[0], device=self.device) * self.shape[1]).mul_(_GOLDEN).add_(self.key)
        column_C = torch.arange(begins[1], ends[1], device=self.device).mul_(_GOLDEN)
        n_elements = _GPU_ELEMENTS if self.device.type == "cuda" else _CPU_ELEMENTS
        n_rows = max(1, n_elements // max(sizes[1], 1))
        for part_rC, row_r in zip(out_RC.split(n_rows), row_R.split(n_rows), strict=True):
            part_rC.copy_(_normal(row_r[:, None] + column_C).mul_(self.scale))
        return out_RC


def _normal(state: Tensor) -> Tensor:
    """float32 of mean 0 and deviation 1 from int64 `state`, which is overwritten: the sum of four uniform numbers."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
        state.bitwise_xor_((state >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    state.bitwise_xor_((state >> _LAST_SHIFT).bitwise_and_((1 << (64 - _LAST_SHIFT)) - 1))
    pairs = (state >> 16).bitwise_and_(_LANES).add_(state.bitwise_and_(_LANES))
    total = (pairs >> 32).add_(pairs.bitwise_and_(0xFFFFFFFF))
    return total.sub_(_MEAN).float().mul_(1 / _DEVIATION)
