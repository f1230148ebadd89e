"""A sparse layer: gate, experts, and the shared expert that every token passes."""

from __future__ import annotations

from torch import Tensor, nn

from fastdeploy.config.schema import MoEShape
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.experts import Experts
from fastdeploy.layers.moe.gate import Gate
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


class SparseMoE(nn.Module):
    """y = sum over the chosen experts of weight * FFN(x), plus the shared FFN where the family has one."""

    def __init__(self, hidden_size: int, moe: MoEShape, place: Placement) -> None:
        super().__init__()
        self.gate = Gate(hidden_size, moe, place)
        self.experts = Experts(moe.n_experts, hidden_size, moe.expert_width, place)
        self.shared = GatedMLP(hidden_size, moe.shared_width, place) if moe.shared_width else None

    def forward(self, x_tH: Tensor) -> Tensor:
        y_tH: Tensor = self.experts(x_tH, self.gate(x_tH))
        return y_tH if self.shared is None else y_tH + self.shared(x_tH)

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from the tensors under `NAME.gate`, `NAME.experts` and `NAME.shared_experts`."""
        self.gate.load(weights, f"{name}.gate")
        self.experts.load(weights, f"{name}.experts")
        if self.shared is not None:
            self.shared.load(weights, f"{name}.shared_experts")
