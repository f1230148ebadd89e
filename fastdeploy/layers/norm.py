"""RMSNorm, over the hidden size or over each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * w` over the last axis, the mean in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = torch.empty(size, dtype=place.dtype, device=place.device)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (self.size,), self.weight, self.eps)

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.weight`, [size]."""
        self.weight.copy_(weights.require(f"{name}.weight", (self.size,)).read())
