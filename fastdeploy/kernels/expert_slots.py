"""From the experts that rows were routed to, to the slots that hold them; rows are counted by expert on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


def slots_of(expert_tk: Tensor, table_eX: Tensor, rows_e: Tensor, offset: int) -> Tensor:
    """See `expert_slots_ref.slots_of_ref`; a captured graph reads the table anew at every replay."""
    expert_tk = expert_tk.contiguous()
    slot_tk = torch.empty_like(expert_tk)
    n_pairs = expert_tk.numel()
    if n_pairs:
        _slots_kernel[(triton.cdiv(n_pairs, _BLOCK),)](
            expert_tk, table_eX, rows_e, slot_tk, n_pairs, offset, expert_tk.shape[1], table_eX.shape[1], _BLOCK,
            num_warps=1,
        )  # fmt: skip
    return slot_tk


@triton.jit(do_not_specialize=["n_pairs", "offset"])
def _slots_kernel(
    expert_ptr, table_ptr, rows_ptr, slot_ptr, n_pairs, offset, K: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = pair < n_pairs
    expert = tl.load(expert_ptr + pair, mask=there, other=0).to(tl.int64)
    n_copies = tl.load(table_ptr + expert * WIDTH, mask=there, other=1)
    copy = (offset + pair // K) % n_copies
    slot = tl.load(table_ptr + expert * WIDTH + 1 + copy, mask=there, other=0)
    tl.store(slot_ptr + pair, slot.to(slot_ptr.dtype.element_ty), mask=there)
    tl.atomic_add(rows_ptr + expert, tl.full((BLOCK,), 1, tl.int64), mask=there, sem="relaxed")
