"""RMSNorm, over the hidden size or over each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.kernels.cpu import norm as cpu_norm
from fastdeploy.kernels.cpu.library import kernels_for
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs
    from fastdeploy.kernels.quantize import RowsFp8


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * w` over the last axis, the mean in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = torch.empty(size, dtype=place.dtype, device=place.device)
        self.kernels = kernels_for(place.device, place.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            # Triton is there on GPUs only.
            from fastdeploy.kernels.rms_norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if self.kernels is not None:
            return cpu_norm.rms_norm(self.kernels, x, self.weight, self.eps)
        return functional.rms_norm(x, (self.size,), self.weight, self.eps)

    def add(self, x_tH: Tensor | SlotOutputs, residual_tH: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), on a GPU in one pass; without a residual (norm(x), x).

        x may be what experts gave, not yet added up; it has a residual then.
        """
        if not isinstance(x_tH, Tensor):
            from fastdeploy.kernels.slots_norm import sum_add_rms_norm

            assert residual_tH is not None, "a sparse layer always has a residual"
            return sum_add_rms_norm(x_tH, residual_tH, self.weight, self.eps)
        if residual_tH is None:
            return self(x_tH), x_tH
        if x_tH.is_cuda:
            from fastdeploy.kernels.rms_norm import add_rms_norm

            return add_rms_norm(x_tH, residual_tH, self.weight, self.eps)
        if self.kernels is not None:
            return cpu_norm.add_rms_norm(self.kernels, x_tH, residual_tH, self.weight, self.eps)
        sum_tH = x_tH + residual_tH
        return functional.rms_norm(sum_tH, (self.size,), self.weight, self.eps), sum_tH

    def add_fp8(self, x_tH: Tensor, residual_tH: Tensor) -> tuple[Tensor, Tensor, RowsFp8]:
        """`add`, and its norm in FP8 besides; on a GPU only."""
        from fastdeploy.kernels.rms_norm import add_rms_norm_fp8

        return add_rms_norm_fp8(x_tH, residual_tH, self.weight, self.eps)

    def in_place(self, x_thd: Tensor) -> None:
        """Norm each head of [t, h, D], which may be some of the heads of a larger tensor."""
        if x_thd.is_cuda:
            from fastdeploy.kernels.rms_norm import rms_norm_

            rms_norm_(x_thd, self.weight, self.eps)
        else:
            x_thd.copy_(self(x_thd))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.weight`, [size]."""
        self.weight.copy_(weights.require(f"{name}.weight", (self.size,)).read())
