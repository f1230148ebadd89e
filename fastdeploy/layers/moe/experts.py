"""The experts of a sparse layer: many gated FFNs, each applied to the rows routed to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.distributed.shared_weights import OwnMemory
from fastdeploy.layers.linear import Linear, packed_matmul_available
from fastdeploy.layers.matmul import stored_dtype
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.packed_ffn import PackedFFN, packed_ffn_available
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource

if TYPE_CHECKING:
    from fastdeploy.layers.moe.fused_experts import FusedExperts

# Between these row counts a CPU of two cores computed the demo model's experts faster all at once; one row reads only
# the experts it needs, and many rows pay for the products with zero. Found by trying 1, 4, 16, 64 and 512 rows.
_MIN_ROWS_AT_ONCE, _MAX_ROWS_AT_ONCE = 2, 40
_MAX_BYTES_AT_ONCE = 16 << 20


class LocalExperts(Protocol):
    """The experts that one rank holds: a contiguous run of all, which `routing` counts from 0.

    `n_local` stands in `routing` for an expert of another rank: a row without any local expert gives zero.
    """

    def __call__(self, x_rH: Tensor, routing: Routing) -> Tensor:
        """Sum over a row's local experts of weight times FFN; [r, H]."""
        ...

    def load(self, weights: WeightSource, name: str, first_expert: int) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`, J from `first_expert` on."""
        ...


def make_experts(n_local: int, hidden_size: int, width: int, place: Placement) -> LocalExperts:
    """`n_local` experts of `width`, as fits the device."""
    place = replace(place, weights=OwnMemory())  # other ranks hold other experts
    if place.device.type == "cuda":
        return fuse_experts(n_local, hidden_size, width, place)
    if packed_ffn_available(place):
        return PackedFFN(n_local, hidden_size, width, place)
    return Experts(n_local, hidden_size, width, place)


def fuse_experts(n_local: int, hidden_size: int, width: int, place: Placement, shared_width: int = 0) -> FusedExperts:
    """Experts of a GPU, on which a shared FFN of `shared_width` is computed along with them."""
    # Triton is there on GPUs only.
    from fastdeploy.layers.moe.fused_experts import FusedExperts

    return FusedExperts(n_local, hidden_size, width, place, shared_width=shared_width)


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
        """See LocalExperts."""
        if self.at_once is not None and _MIN_ROWS_AT_ONCE <= x_tH.shape[0] <= _MAX_ROWS_AT_ONCE:
            at_once_tH: Tensor = self.at_once(x_tH, routing)
            return at_once_tH
        # On the host: numpy sorts a handful of ids faster than torch does.
        expert_r = routing.expert_tk.cpu().numpy().ravel()
        n_rows_e = np.bincount(expert_r, minlength=len(self.ffn_e) + 1)[:-1].tolist()
        # Rows for experts elsewhere come last.
        order_r = torch.from_numpy(np.argsort(expert_r, kind="stable")[: sum(n_rows_e)]).to(x_tH.device)
        token_r = order_r // routing.expert_tk.shape[1]
        x_rH = x_tH.index_select(0, token_r)
        weight_r1 = routing.weight_tk.view(-1, 1).index_select(0, order_r)
        parts, first = [x_tH.new_empty(0, x_tH.shape[1])], 0
        for ffn, n_rows in zip(self.ffn_e, n_rows_e, strict=True):
            if n_rows:
                parts.append(ffn(x_rH[first : first + n_rows]))
                first += n_rows
        return torch.zeros_like(x_tH).index_add_(0, token_r, torch.cat(parts).mul_(weight_r1))

    def load(self, weights: WeightSource, name: str, first_expert: int = 0) -> None:
        """See LocalExperts."""
        for i, ffn in enumerate(self.ffn_e):
            assert isinstance(ffn, GatedMLP)
            ffn.load(weights, f"{name}.{first_expert + i}")
        if self.at_once is not None:
            self.at_once.load(weights, name, first_expert)


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
        # One column more takes what goes to experts elsewhere, of which a row may have several.
        weight_te = x_tH.new_zeros(n_tokens, self.n_experts + 1).scatter_(1, routing.expert_tk, routing.weight_tk)
        y_teM = functional.silu(gate_teM).mul_(up_teM).mul_(weight_te[:, :-1, None])
        y_tH: Tensor = self.down(y_teM.view(n_tokens, -1))
        return y_tH

    def load(self, weights: WeightSource, name: str, first_expert: int) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`, J from `first_expert` on."""
        experts = [f"{name}.{first_expert + i}" for i in range(self.n_experts)]
        self.gate_up.load(weights, [f"{expert}.{part}_proj" for expert in experts for part in ("gate", "up")])
        shape = (self.hidden_size, self.width)
        parts = [weights.require(f"{expert}.down_proj.weight", shape).read() for expert in experts]
        dtype = stored_dtype({part_HM.dtype for part_HM in parts}, self.place)
        self.down.set_weight(torch.cat([part_HM.to(dtype) for part_HM in parts], dim=1))
