"""The experts of a sparse layer: many gated FFNs, each applied to the rows routed to it."""

from __future__ import annotations

import numpy as np
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
        # On the host: numpy sorts a handful of ids faster than torch does.
        expert_r = routing.expert_tk.cpu().numpy().ravel()
        order_r = torch.from_numpy(np.argsort(expert_r, kind="stable")).to(x_tH.device)
        n_rows_e = np.bincount(expert_r, minlength=len(self.ffn_e)).tolist()
        token_r = order_r // routing.expert_tk.shape[1]
        x_rH = x_tH.index_select(0, token_r)
        weight_r1 = routing.weight_tk.view(-1, 1).index_select(0, order_r)
        y_tH = torch.zeros_like(x_tH)
        first = 0
        for ffn, n_rows in zip(self.ffn_e, n_rows_e, strict=True):
            if n_rows:
                rows = slice(first, first + n_rows)
                y_tH.index_add_(0, token_r[rows], ffn(x_rH[rows]).mul_(weight_r1[rows]))
                first += n_rows
        return y_tH

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`."""
        for i, ffn in enumerate(self.ffn_e):
            assert isinstance(ffn, GatedMLP)
            ffn.load(weights, f"{name}.{i}")
