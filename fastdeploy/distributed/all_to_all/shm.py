"""Exchange between CPU ranks of one machine through memory they share: one meeting each way.

Each rank writes its rows once, where the rows of all ranks lie one after the other, so that what dispatch gives is a
view. Combining, each rank writes what its experts gave for all rows, and adds up what all ranks gave for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from fastdeploy.distributed.all_to_all.base import Dispatched, ExpertRows
from fastdeploy.distributed.collectives import sum_in_order
from fastdeploy.distributed.exchange_size import ExchangeSize
from fastdeploy.distributed.groups import STEP_PATIENCE_S, Group
from fastdeploy.distributed.shared_region import SharedRegion
from fastdeploy.layers.moe.gate import Routing

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs


@dataclass(frozen=True, slots=True)
class _Message:
    """Rows and their routing, as they lie in a buffer."""

    x_rH: Tensor
    expert_rk: Tensor
    weight_rk: Tensor


@dataclass(frozen=True, slots=True)
class _Views:
    """One buffer as it is used for ranks that send `n_rows_g` rows."""

    n_rows_g: tuple[int, ...]
    whole: _Message  # of all ranks
    mine: _Message
    given_rH: Tensor  # where this rank puts what its experts gave
    back_gtH: list[Tensor]  # what each rank's experts gave for the rows of this one


class SharedAllToAll:
    """See the module's text; implements AllToAll."""

    adds_slots = False

    def __init__(self, group: Group, rows: ExpertRows) -> None:
        assert group.store is not None, "a rank by itself exchanges nothing"
        self._size, self._rank = group.where.group_size, group.where.group_rank
        self._rows = rows
        self._local_id_e = rows.local_ids(group)
        size = ExchangeSize(self._size, rows.row_bytes, rows.n_experts_per_token, rows.dtype.itemsize)
        self.max_rows: int | None = size.max_rows
        self._region = SharedRegion(
            PrefixStore("all_to_all", group.store),
            self._rank,
            group.names(),
            size.buffer_bytes,
            n_ranks_here=group.n_ranks_here,
            deadline_s=STEP_PATIENCE_S,
        )
        self._views: list[_Views | None] = [None, None]  # of each buffer, for the sizes used last

    def dispatch(self, x_tH: Tensor, routing: Routing, n_rows_g: tuple[int, ...]) -> Dispatched:
        views = self._views_of(n_rows_g, routing.weight_tk.dtype)
        mine = views.mine
        mine.x_rH.copy_(x_tH)
        mine.expert_rk.copy_(routing.expert_tk)
        mine.weight_rk.copy_(routing.weight_tk)
        self._region.meet()
        local_rk = self._local_id_e.take(views.whole.expert_rk)
        return Dispatched(views.whole.x_rH, Routing(local_rk, views.whole.weight_rk), n_rows_g)

    def combine(self, y_rH: Tensor | SlotOutputs, sent: Dispatched, own: Callable[[], Tensor] | None = None) -> Tensor:
        assert isinstance(y_rH, Tensor), "slots are added up before"
        views = self._views_of(sent.n_rows_g, sent.routing.weight_tk.dtype)
        views.given_rH.copy_(y_rH)
        self._region.announce()
        own_tH = own() if own is not None else None
        self._region.wait()
        y_tH = sum_in_order(views.back_gtH)
        return y_tH if own_tH is None else y_tH + own_tH

    def _views_of(self, n_rows_g: tuple[int, ...], weight_dtype: torch.dtype) -> _Views:
        """Those of the buffer whose turn it is; steps repeat sizes over all their layers, and often each other's."""
        turn = self._region.turn
        views = self._views[turn]
        if views is None or views.n_rows_g != n_rows_g or views.whole.weight_rk.dtype != weight_dtype:
            views = self._views[turn] = self._make_views(n_rows_g, weight_dtype)
        return views

    def _make_views(self, n_rows_g: tuple[int, ...], weight_dtype: torch.dtype) -> _Views:
        n_rows, k, dtype = sum(n_rows_g), self._rows.n_experts_per_token, self._rows.dtype
        first = sum(n_rows_g[: self._rank])
        mine = slice(first, first + n_rows_g[self._rank])
        buffer = self._region.buffer()
        # Ids go first: they need the widest alignment.
        end_of_ids = n_rows * k * torch.int64.itemsize
        end_of_x = end_of_ids + n_rows * self._rows.row_bytes
        end = end_of_x + n_rows * k * weight_dtype.itemsize
        whole = _Message(
            buffer[end_of_ids:end_of_x].view(dtype).view(n_rows, -1),
            buffer[:end_of_ids].view(torch.int64).view(n_rows, k),
            buffer[end_of_x:end].view(weight_dtype).view(n_rows, k),
        )
        y_grH = buffer[: self._size * n_rows * self._rows.row_bytes].view(dtype).view(self._size, n_rows, -1)
        return _Views(
            n_rows_g,
            whole,
            _Message(whole.x_rH[mine], whole.expert_rk[mine], whole.weight_rk[mine]),
            y_grH[self._rank],
            [y_rH[mine] for y_rH in y_grH],
        )
