"""A sparse layer: gate, experts here or on all ranks, and the shared expert that every token passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdeploy.config.schema import MoEShape
from fastdeploy.distributed.sharding import FFNShare
from fastdeploy.distributed.topology import cut_into_pieces, local_experts, rows_to_dispatch, run_of
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.expert_slots import make_slots
from fastdeploy.layers.moe.experts import LocalExperts, fuse_experts, make_experts
from fastdeploy.layers.moe.gate import Gate, Routing
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource
from fastdeploy.runner.step import StepContext
from fastdeploy.wire.messages import StepAgreement

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs
    from fastdeploy.kernels.quantize import RowsFp8
    from fastdeploy.layers.moe.fused_experts import FusedExperts


def spreads_shared(moe: MoEShape, place: Placement) -> bool:
    """Whether the FFN that every row passes is spread like the experts: each rank computes a part of it for all rows.

    Its weights are read once by the group then, not once by every rank.
    """
    where = place.peers.where
    part = where.group_size * moe.expert_width
    return place.device.type == "cuda" and where.spreads_experts and moe.shared_width > 0 == moe.shared_width % part


class SparseMoE(nn.Module):
    """y = sum over the chosen experts of weight * FFN(x), plus the shared FFN where the family has one.

    Tensor ranks share the width of every FFN, but for experts that are spread over the ranks: those stay whole.
    """

    def __init__(self, hidden_size: int, moe: MoEShape, place: Placement) -> None:
        super().__init__()
        self.moe = moe
        self.peers = place.peers
        where = place.peers.where
        self.n_sharing = 1 if where.spreads_experts else where.n_tensor  # ranks that share each expert
        self.first_expert, self.n_local = local_experts(moe, where)
        self.slots = make_slots(moe, place)
        if self.slots is not None:
            self.first_expert, self.n_local = 0, self.slots.n_local
        self.gate = Gate(hidden_size, moe, place)
        width = moe.expert_width // self.n_sharing
        self.experts: LocalExperts
        self.shared, self.fused = None, None
        # Ranks that share the FFN which every row passes: those that get the row.
        self.n_sharing_all = where.group_size if spreads_shared(moe, place) else where.n_tensor
        shared_width = moe.shared_width // self.n_sharing_all
        if shared_width and place.device.type == "cuda" and (not where.spreads_experts or spreads_shared(moe, place)):
            self.experts = self.fused = fuse_experts(self.n_local, hidden_size, width, place, shared_width)
        else:
            self.experts = make_experts(self.n_local, hidden_size, width, place)
            self.shared = GatedMLP(hidden_size, shared_width, place) if shared_width else None
        self.load_e: Tensor | None = None

    def forward(self, x_tH: Tensor, step: StepContext) -> Tensor:
        routing = self.gate(x_tH)
        if self.peers.where.spreads_experts:
            y_tH = self._exchange(x_tH, routing, step.agreement)
        else:
            y_tH = self._add_shared(self._compute(x_tH, routing), x_tH)
        return self.peers.all_reduce_sum(y_tH)

    @property
    def whole(self) -> FusedExperts | None:
        """The experts, where all that a row passes is in them, on this GPU alone: for `slot_outputs`."""
        alone = not self.peers.where.spreads_experts and self.peers.where.n_tensor == 1
        if not alone or self.shared is not None or self.load_e is not None or not self.gate.weight_eH.is_cuda:
            return None
        from fastdeploy.layers.moe.fused_experts import FusedExperts

        assert isinstance(self.experts, FusedExperts), "on GPUs there are no others"
        return self.experts

    def slot_outputs(self, x_tH: Tensor, experts: FusedExperts, rows8: RowsFp8 | None) -> SlotOutputs:
        """`forward` but for the last addition, which the next norm does; `experts` is `whole`, `rows8` is x in FP8."""
        return experts.slots(x_tH, self.gate(x_tH), rows8)

    def count_loads(self) -> None:
        """From now on count the rows that go to each local expert."""
        self.load_e = torch.zeros(self.n_local + 1, dtype=torch.int64, device=self.gate.weight_eH.device)

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from the tensors under `NAME.gate`, `NAME.experts` and `NAME.shared_experts`."""
        where = self.peers.where
        self.gate.load(weights, f"{name}.gate")
        part = where.group_rank if self.n_sharing_all == where.group_size else where.tensor_rank
        share = FFNShare(weights, self.n_sharing_all, part)
        of_experts = FFNShare(weights, where.n_tensor, where.tensor_rank) if self.n_sharing > 1 else weights
        if self.slots is not None:
            of_experts = self.slots.weights(of_experts, f"{name}.experts")
        if self.fused is not None:
            self.fused.load(of_experts, f"{name}.experts", self.first_expert, f"{name}.shared_experts", share)
            return
        self.experts.load(of_experts, f"{name}.experts", self.first_expert)
        if self.shared is not None:
            self.shared.load(share, f"{name}.shared_experts")

    def _compute(self, x_rH: Tensor, routing: Routing) -> Tensor:
        """The local experts' part, for rows that are here."""
        if self.load_e is not None:
            expert_r = routing.expert_tk.view(-1).long()
            self.load_e.scatter_add_(0, expert_r, torch.ones_like(expert_r))
        y_rH: Tensor = self.experts(x_rH, routing)
        return y_rH

    def _add_shared(self, y_tH: Tensor, x_tH: Tensor) -> Tensor:
        return y_tH if self.shared is None else y_tH + self.shared(x_tH)

    def _exchange(self, x_tH: Tensor, routing: Routing, agreement: StepAgreement | None) -> Tensor:
        """All ranks' experts' part of the rows that this tensor rank sends, and the shared FFN of all rows here."""
        where, all_to_all = self.peers.where, self.peers.all_to_all
        if agreement is None:  # one replica needs none: its ranks have the same rows
            agreement = StepAgreement([x_tH.shape[0]], x_tH.shape[0], False)
        n_rows_g = rows_to_dispatch(agreement, where.n_tensor)
        begin, _ = run_of(x_tH.shape[0], where.n_tensor, where.tensor_rank)
        pieces = cut_into_pieces(n_rows_g, all_to_all.max_rows)
        if len(pieces) == 1 and where.n_tensor == 1:
            own = None if self.shared is None else partial(self.shared, x_tH)
            return self._exchange_piece(x_tH, routing, n_rows_g, own)
        y_tH = torch.zeros_like(x_tH)
        for piece in pieces:
            first = begin + piece.first_g[where.group_rank]
            rows = slice(first, first + piece.n_rows_g[where.group_rank])
            part = replace(routing, expert_tk=routing.expert_tk[rows], weight_tk=routing.weight_tk[rows])
            y_tH[rows] = self._exchange_piece(x_tH[rows], part, piece.n_rows_g)
        return self._add_shared(y_tH, x_tH)

    def _exchange_piece(
        self, x_tH: Tensor, routing: Routing, n_rows_g: tuple[int, ...], own: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`own`: see AllToAll.combine."""
        if self.slots is not None:
            routing = self.slots(routing)
        sent = self.peers.all_to_all.dispatch(x_tH, routing, n_rows_g)
        if self.peers.all_to_all.adds_slots and self.load_e is None:
            from fastdeploy.layers.moe.fused_experts import FusedExperts

            assert isinstance(self.experts, FusedExperts), "on GPUs there are no others"
            return self.peers.all_to_all.combine(self.experts.slots(sent.x_rH, sent.routing), sent, own)
        return self.peers.all_to_all.combine(self._compute(sent.x_rH, sent.routing), sent, own)
