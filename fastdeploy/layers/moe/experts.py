"""The experts of a sparse layer: many gated FFNs, each applied to the rows routed to it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.layers.linear import Linear, packed_matmul_available
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource

# Between these row counts a CPU of two cores computed the demo model's experts faster all at once; one row reads only
# the experts it needs, and many rows pay for the products with zero. Found by trying 1, 4, 16, 64 and 512 rows.
_MIN_ROWS_AT_ONCE, _MAX_ROWS_AT_ONCE = 2, 40
_MAX_BYTES_AT_ONCE = 16 << 20


class Experts(nn.Module):
    """E gated FFNs of width M; the reference way: one expert after the other, over its own rows only.

    Small experts on a CPU have a second way for the few rows of a decode step: all experts as one wide FFN, where a
    row's weight is zero for the experts that it was not routed to.
    """

    def __init__(self, n_experts: int, hidden_size: int, width: int, place: Placement) -> None:
        super().__init__()
        self.ffn_e = nn.ModuleList(GatedMLP(hidden_size, width, place) for _ in range(n_experts))
        n_bytes = 3 * n_experts * hidden_size * width * place.dtype.itemsize
        self.at_once = None
        if packed_matmul_available(place) and n_bytes <= _MAX_BYTES_AT_ONCE:
            self.at_once = _AllAtOnce(n_experts, hidden_size, width, place)

    def forward(self, x_tH: Tensor, routing: Routing) -> Tensor:
        """Sum over a token's experts of weight times FFN; [t, H]."""
        if self.at_once is not None and _MIN_ROWS_AT_ONCE <= x_tH.shape[0] <= _MAX_ROWS_AT_ONCE:
            at_once_tH: Tensor = self.at_once(x_tH, routing)
            return at_once_tH
        # On the host: numpy sorts a handful of ids faster than torch does.
        expert_r = routing.expert_tk.cpu().numpy().ravel()
        order_r = torch.from_numpy(np.argsort(expert_r, kind="stable")).to(x_tH.device)
        n_rows_e = np.bincount(expert_r, minlength=len(self.ffn_e)).tolist()
        token_r = order_r // routing.expert_tk.shape[1]
        x_rH = x_tH.index_select(0, token_r)
        weight_r1 = routing.weight_tk.view(-1, 1).index_select(0, order_r)
        parts, first = [x_tH.new_empty(0, x_tH.shape[1])], 0
        for ffn, n_rows in zip(self.ffn_e, n_rows_e, strict=True):
            if n_rows:
                parts.append(ffn(x_rH[first : first + n_rows]))
                first += n_rows
        return torch.zeros_like(x_tH).index_add_(0, token_r, torch.cat(parts).mul_(weight_r1))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`."""
        for i, ffn in enumerate(self.ffn_e):
            assert isinstance(ffn, GatedMLP)
            ffn.load(weights, f"{name}.{i}")
        if self.at_once is not None:
            self.at_once.load(weights, name)


class _AllAtOnce(nn.Module):
    """All experts side by side: gate and up as one matrix [e * 2M, H], down as one matrix [H, e * M]."""

    def __init__(self, n_experts: int, hidden_size: int, width: int, place: Placement) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.width = width
        self.hidden_size = hidden_size
        self.place = place
        self.gate_up = Linear(hidden_size, (width,) * (2 * n_experts), place)
        self.down = Linear(n_experts * width, (hidden_size,), place)

    def forward(self, x_tH: Tensor, routing: Routing) -> Tensor:
        n_tokens = x_tH.shape[0]
        gate_teM, up_teM = self.gate_up(x_tH).view(n_tokens, self.n_experts, 2, self.width).unbind(2)
        weight_te = x_tH.new_zeros(n_tokens, self.n_experts).scatter_(1, routing.expert_tk, routing.weight_tk)
        y_teM = functional.silu(gate_teM).mul_(up_teM).mul_(weight_te[:, :, None])
        y_tH: Tensor = self.down(y_teM.view(n_tokens, -1))
        return y_tH

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`."""
        names = [f"{name}.{i}.{part}_proj" for i in range(self.n_experts) for part in ("gate", "up")]
        self.gate_up.load(weights, names)
        down_HX = torch.empty(self.hidden_size, self.n_experts * self.width, dtype=self.place.dtype)
        for i, columns_HM in enumerate(down_HX.split(self.width, dim=1)):
            shape = (self.hidden_size, self.width)
            columns_HM.copy_(weights.require(f"{name}.{i}.down_proj.weight", shape).read())
        self.down.set_weight(down_HX)
