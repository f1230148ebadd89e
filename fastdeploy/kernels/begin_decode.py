"""What a decode step starts with, in one launch: new pages into the page table, token ids, rotations of positions.

Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def begin_decode_ref(
    slot_s: Tensor,
    position_s: Tensor,
    column_s: Tensor,
    page_s: Tensor,
    newest_s: Tensor,
    rotation_pd: Tensor,
    page_table_sp: Tensor,
) -> tuple[Tensor, Tensor]:
    """(ids [s], rotation [s, D/2]) of the rows' newest tokens and positions; writes page_s into the page table.

    Each row's page goes to (slot_s, column_s); a column below 0 is no page. Rows of one slot must not both have one.
    """
    new = column_s >= 0
    page_table_sp[slot_s[new].long(), column_s[new].long()] = page_s[new]
    return newest_s[slot_s.long()], rotation_pd[position_s.long()]


def begin_decode(
    slot_s: Tensor,
    position_s: Tensor,
    column_s: Tensor,
    page_s: Tensor,
    newest_s: Tensor,
    rotation_pd: Tensor,
    page_table_sp: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the reference, for int32 rows, int64 `newest_s`, complex64 rotations and an int32 page table."""
    n_rows, n_pairs = slot_s.shape[0], rotation_pd.shape[1]
    ids_s = torch.empty(n_rows, dtype=torch.int64, device=slot_s.device)
    rotation_sd = torch.empty((n_rows, n_pairs), dtype=torch.complex64, device=slot_s.device)
    if n_rows:
        _begin_kernel[(n_rows,)](
            slot_s,
            position_s,
            column_s,
            page_s,
            newest_s,
            torch.view_as_real(rotation_pd),
            page_table_sp,
            ids_s,
            torch.view_as_real(rotation_sd),
            page_table_sp.stride(0),
            SIZE=2 * n_pairs,
            BLOCK=triton.next_power_of_2(2 * n_pairs),
            num_warps=1,
        )
    return ids_s, rotation_sd


@triton.jit
def _begin_kernel(
    slot_ptr,
    position_ptr,
    column_ptr,
    page_ptr,
    newest_ptr,
    rotations_ptr,
    table_ptr,
    ids_ptr,
    rotation_ptr,
    table_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    position = tl.load(position_ptr + row).to(tl.int64)
    column = tl.load(column_ptr + row)
    if column >= 0:
        tl.store(table_ptr + slot * table_stride + column, tl.load(page_ptr + row))
    tl.store(ids_ptr + row, tl.load(newest_ptr + slot))
    part = tl.arange(0, BLOCK)
    turn = tl.load(rotations_ptr + position * SIZE + part, mask=part < SIZE)
    tl.store(rotation_ptr + row.to(tl.int64) * SIZE + part, turn, mask=part < SIZE)
