"""The experts of a sparse layer: many gated FFNs, each applied to the rows routed to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


class Experts(nn.Module):
    """E gated FFNs of width M; the reference way: one expert after the other, over its own rows only."""

    def __init__(self, n_experts: int, hidden_size: int, width: int, place: Placement) -> None:
        super().__init__()
        self.ffn_e = nn.ModuleList(GatedMLP(hidden_size, width, place) for _ in range(n_experts))

    def forward(self, x_tH: Tensor, routing: Routing) -> Tensor:
        """Sum over a token's experts of weight times FFN; [t, H]."""
        n_chosen = routing.expert_tk.shape[1]
        order_r = routing.expert_tk.flatten().argsort(stable=True)
        token_r = order_r // n_chosen
        weight_r1 = routing.weight_tk.flatten()[order_r, None]
        n_rows_e = torch.bincount(routing.expert_tk.flatten(), minlength=len(self.ffn_e)).tolist()
        x_rH = x_tH.index_select(0, token_r)
        y_rH = [ffn(x_nH) for ffn, x_nH in zip(self.ffn_e, x_rH.split(n_rows_e), strict=True) if x_nH.shape[0]]
        if not y_rH:
            return torch.zeros_like(x_tH)
        return torch.zeros_like(x_tH).index_add_(0, token_r, torch.cat(y_rH).mul_(weight_r1))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`."""
        for i, ffn in enumerate(self.ffn_e):
            assert isinstance(ffn, GatedMLP)
            ffn.load(weights, f"{name}.{i}")
