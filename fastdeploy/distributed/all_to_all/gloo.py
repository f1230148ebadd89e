"""Exchange between CPU ranks, on one machine or several: the reference. One collective each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdeploy.distributed.all_to_all.base import Dispatched, ExpertRows, pack_rows, unpack_rows
from fastdeploy.distributed.collectives import group_errors, sum_in_order
from fastdeploy.distributed.groups import Group
from fastdeploy.layers.moe.gate import Routing

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs

_MAX_BYTES = 32 << 20  # of what comes back from all ranks in one exchange


class GlooAllToAll:
    """See the module's text; implements AllToAll."""

    adds_slots = False

    def __init__(self, group: Group, rows: ExpertRows) -> None:
        assert group.everyone is not None, "a rank by itself exchanges nothing"
        self._group = group.everyone
        self._name = group.name
        self._size, self._rank = group.where.group_size, group.where.group_rank
        self._rows = rows
        self._local_id_e = rows.local_ids(group)
        self.max_rows: int | None = max(self._size, _MAX_BYTES // (self._size * rows.row_bytes))

    def dispatch(self, x_tH: Tensor, routing: Routing, n_rows_g: tuple[int, ...]) -> Dispatched:
        mine_tB = pack_rows(x_tH, routing)
        row_bytes = mine_tB.shape[1]
        message_rB = mine_tB.new_empty(sum(n_rows_g), row_bytes)
        received = [n * row_bytes for n in n_rows_g]
        with group_errors(self._name):
            # Flat: gloo's splits count along the first axis, of which an empty one would be refused.
            work = self._group.alltoall_base(
                message_rB.view(-1), mine_tB.view(-1).repeat(self._size), received, [mine_tB.numel()] * self._size
            )
            work.wait()
        x_rH, expert_rk, weight_rk = unpack_rows(message_rB, self._rows, routing.weight_tk.dtype)
        return Dispatched(x_rH, Routing(self._local_id_e[expert_rk], weight_rk), n_rows_g)

    def combine(self, y_rH: Tensor | SlotOutputs, sent: Dispatched, own: Callable[[], Tensor] | None = None) -> Tensor:
        assert isinstance(y_rH, Tensor), "slots are added up before"
        n_mine, row_bytes = sent.n_rows_g[self._rank], self._rows.row_bytes
        y_gtH = y_rH.new_empty(self._size, n_mine, self._rows.hidden_size)
        with group_errors(self._name):
            work = self._group.alltoall_base(
                y_gtH.view(-1).view(torch.uint8),
                y_rH.contiguous().view(-1).view(torch.uint8),
                [n_mine * row_bytes] * self._size,
                [n * row_bytes for n in sent.n_rows_g],
            )
        own_tH = own() if own is not None else None
        with group_errors(self._name):
            work.wait()
        y_tH = sum_in_order(list(y_gtH))
        return y_tH if own_tH is None else y_tH + own_tH
