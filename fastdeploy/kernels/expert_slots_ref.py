"""The slots of experts without Triton: what the kernel computes, and the way of a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def slots_of_ref(expert_tk: Tensor, table_eX: Tensor, rows_e: Tensor, offset: int) -> Tensor:
    """The slot [t, k] for each expert [t, k] of each row, in the same integer type; row i takes copy (offset + i) % n.

    table_eX: int32 [e, 1 + most copies], for each expert the number n of its copies, then their slots. rows_e: int64
    [e], which grows by the rows of each expert.
    """
    expert_p = expert_tk.reshape(-1)
    rows_e.scatter_add_(0, expert_p.long(), torch.ones_like(expert_p, dtype=rows_e.dtype))
    row_t1 = torch.arange(offset, offset + expert_tk.shape[0], device=expert_tk.device)[:, None]
    place_tk = expert_tk.long() * table_eX.shape[1]
    table = table_eX.reshape(-1)
    return table.take(place_tk + 1 + row_t1 % table.take(place_tk)).to(expert_tk.dtype)
