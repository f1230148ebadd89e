"""The gated feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.layers.linear import Linear
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020); gate and up are one matrix."""

    def __init__(self, hidden_size: int, width: int, place: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, (width, width), place, bias=bias)
        self.down = Linear(width, (hidden_size,), place, bias=bias)

    def forward(self, x_tH: Tensor) -> Tensor:
        gate_tM, up_tM = self.gate_up(x_tH).chunk(2, dim=-1)
        y_tH: Tensor = self.down(functional.silu(gate_tM).mul_(up_tM))
        return y_tH

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.{gate,up,down}_proj`."""
        self.gate_up.load(weights, (f"{name}.gate_proj", f"{name}.up_proj"))
        self.down.load(weights, (f"{name}.down_proj",))
