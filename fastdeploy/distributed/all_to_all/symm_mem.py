"""Exchange between GPUs of one host through memory that all of them map: one kernel each way, also inside a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdeploy.distributed.all_to_all.base import Dispatched, ExpertRows
from fastdeploy.distributed.groups import Group
from fastdeploy.distributed.peer_memory import PeerMemory
from fastdeploy.distributed.topology import run_of
from fastdeploy.kernels.moe_rows import SlotOutputs
from fastdeploy.kernels.peer_exchange import (
    MAX_PROGRAMS,
    PeerLayout,
    PeerView,
    combine_rows,
    dispatch_rows,
)
from fastdeploy.layers.moe.gate import Routing

_MAX_BYTES = 512 << 20  # of each GPU
_MAX_ROWS = 1 << 15  # of all ranks in one exchange


class SymmetricAllToAll:
    """See the module's text; implements AllToAll."""

    adds_slots = True

    def __init__(self, group: Group, rows: ExpertRows) -> None:
        size, rank = group.where.group_size, group.where.group_rank
        k, itemsize = rows.n_experts_per_token, rows.dtype.itemsize
        row_bytes = rows.row_bytes * (1 + size) + 8 * k
        n_rows = max(size, min(_MAX_ROWS, _MAX_BYTES // row_bytes))
        layout = PeerLayout(size, n_rows, rows.n_experts, k, rows.hidden_size, itemsize)
        self.max_rows: int | None = n_rows
        self._every_row = rows.every_row
        self._memory = PeerMemory(group, "all_to_all", layout.n_bytes)
        address_g = self._memory.address_g
        epoch_p = torch.zeros(2, MAX_PROGRAMS, dtype=torch.int32, device=address_g.device)
        self._view = PeerView(layout, rank, address_g, local_ids(rows.n_experts, size).to(address_g.device), epoch_p)
        self._x_rH = self._part(layout.x_at, n_rows, rows.hidden_size, rows.dtype)
        self._expert_rk = self._part(layout.expert_at, n_rows, k, torch.int32)
        self._weight_rk = self._part(layout.weight_at, n_rows, k, torch.float32)
        self._n_local = run_of(rows.n_experts, size, rank)[1]

    def dispatch(self, x_tH: Tensor, routing: Routing, n_rows_g: tuple[int, ...]) -> Dispatched:
        dispatch_rows(
            self._view,
            x_tH.contiguous(),
            routing.expert_tk.contiguous(),
            routing.weight_tk.contiguous(),
            n_rows_g,
            every_row=self._every_row,
        )
        n_rows = sum(n_rows_g)
        routing = Routing(self._expert_rk[:n_rows], self._weight_rk[:n_rows])
        return Dispatched(self._x_rH[:n_rows], routing, n_rows_g)

    def combine(self, y_rH: Tensor | SlotOutputs, sent: Dispatched, own: Callable[[], Tensor] | None = None) -> Tensor:
        if isinstance(y_rH, Tensor):  # one slot, added as it is
            y_rH = SlotOutputs(y_rH.contiguous(), None, None, self._n_local, 1)
        y_tH = combine_rows(self._view, y_rH, sent.n_rows_g)
        return y_tH if own is None else y_tH + own()

    def _part(self, begin: int, n_rows: int, n_columns: int, dtype: torch.dtype) -> Tensor:
        n_bytes = n_rows * n_columns * dtype.itemsize
        part: Tensor = self._memory.mine[begin : begin + n_bytes].view(dtype).view(n_rows, n_columns)
        return part


def local_ids(n_experts: int, size: int) -> Tensor:
    """int32 [size, n_experts + 1]: the number of each expert on each rank, see PeerView."""
    table_ge = torch.empty(size, n_experts + 1, dtype=torch.int32)
    for rank in range(size):
        first, n_local = run_of(n_experts, size, rank)
        table_ge[rank] = n_local
        table_ge[rank, first : first + n_local] = torch.arange(n_local, dtype=torch.int32)
    return table_ge
