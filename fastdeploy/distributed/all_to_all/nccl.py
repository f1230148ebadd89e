"""Exchange between GPUs by NCCL: one collective each way, always of as many rows as the rank with most of them sends.

Row counts of all ranks are equal inside a graph; otherwise rows that make them so go to no expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdeploy.distributed.all_to_all.base import Dispatched, ExpertRows, pack_rows, unpack_rows
from fastdeploy.distributed.collectives import group_errors
from fastdeploy.distributed.groups import Group
from fastdeploy.layers.moe.gate import Routing

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs


class NcclAllToAll:
    """See the module's text; implements AllToAll."""

    adds_slots = False

    def __init__(self, group: Group, rows: ExpertRows) -> None:
        assert group.everyone is not None, "a rank by itself exchanges nothing"
        self._group = group.everyone
        self._name = group.name
        self._size, self._rank = group.where.group_size, group.where.group_rank
        self._rows = rows
        self._local_id_e = rows.local_ids(group)
        self.max_rows: int | None = None

    def dispatch(self, x_tH: Tensor, routing: Routing, n_rows_g: tuple[int, ...]) -> Dispatched:
        n_padded, n_mine = max(n_rows_g), x_tH.shape[0]
        if n_mine < n_padded:
            x_tH, routing = self._pad(x_tH, routing, n_padded - n_mine)
        mine_tB = pack_rows(x_tH, routing)
        message_rB = mine_tB.new_empty(self._size * n_padded, mine_tB.shape[1])
        with group_errors(self._name):
            self._group._allgather_base(message_rB, mine_tB).wait()
        x_rH, expert_rk, weight_rk = unpack_rows(message_rB, self._rows, routing.weight_tk.dtype)
        return Dispatched(x_rH, Routing(self._local_id_e[expert_rk], weight_rk), n_rows_g)

    def combine(self, y_rH: Tensor | SlotOutputs, sent: Dispatched, own: Callable[[], Tensor] | None = None) -> Tensor:
        assert isinstance(y_rH, Tensor), "slots are added up before"
        y_gtH = y_rH.new_empty(self._size, y_rH.shape[0] // self._size, y_rH.shape[1])
        with group_errors(self._name):
            work = self._group.alltoall_base(y_gtH.view(y_rH.shape), y_rH.contiguous(), [], [])
        own_tH = own() if own is not None else None
        with group_errors(self._name):
            work.wait()
        # Added in float32: partial sums of half precision would lose more with every rank.
        y_tH = y_gtH[:, : sent.n_rows_g[self._rank]].sum(0, dtype=torch.float32).to(y_rH.dtype)
        return y_tH if own_tH is None else y_tH + own_tH

    def _pad(self, x_tH: Tensor, routing: Routing, n: int) -> tuple[Tensor, Routing]:
        k, nowhere = self._rows.n_experts_per_token, self._rows.n_experts
        return torch.cat((x_tH, x_tH.new_zeros(n, x_tH.shape[1]))), Routing(
            torch.cat((routing.expert_tk, routing.expert_tk.new_full((n, k), nowhere))),
            torch.cat((routing.weight_tk, routing.weight_tk.new_zeros(n, k))),
        )
