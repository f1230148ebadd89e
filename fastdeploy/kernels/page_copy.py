"""Copies of KV pages and their check values on a GPU, in one pass over the memory. Imported only where Triton is.

The reference is `page_copy_ref.py`. The source may be memory of another GPU of this host, opened through CUDA IPC.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.page_copy_ref import KEY_STEP

_BLOCK_WORDS = 1024


def copy_pages(from_p2hW: Tensor, from_ids: Tensor, to_p2hW: Tensor | None, to_ids: Tensor | None) -> Tensor:
    """As `copy_pages_ref`, on the current stream; nothing waits for it."""
    n_heads, n_words = from_p2hW.shape[2:]
    checks_nh = torch.empty(len(from_ids), n_heads, dtype=torch.int64, device=from_ids.device)
    copies = to_p2hW is not None and to_ids is not None
    to, targets = (to_p2hW, to_ids) if copies else (from_p2hW, from_ids)
    assert to is not None and targets is not None
    if checks_nh.numel():
        _copy_pages_kernel[(len(from_ids), n_heads)](
            from_p2hW,
            from_ids,
            to,
            targets,
            checks_nh,
            *from_p2hW.stride()[:2],
            *to.stride()[:2],
            KEY_STEP=KEY_STEP,
            N_WORDS=n_words,
            BLOCK=min(_BLOCK_WORDS, triton.next_power_of_2(n_words)),
            COPIES=copies,
        )
    return checks_nh


@triton.jit
def _copy_pages_kernel(
    from_ptr,
    from_ids_ptr,
    to_ptr,
    to_ids_ptr,
    checks_ptr,
    from_page_stride,
    from_values,
    to_page_stride,
    to_values,
    KEY_STEP: tl.constexpr,
    N_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
):
    """One program per page and head: its keys, then its values."""
    n, head = tl.program_id(0), tl.program_id(1)
    source = from_ptr + tl.load(from_ids_ptr + n) * from_page_stride + head * N_WORDS
    target = to_ptr + tl.load(to_ids_ptr + n) * to_page_stride + head * N_WORDS
    number = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], 0xFFFFFFFF, tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    for part in range(2):
        for first in range(0, N_WORDS, BLOCK):
            word = first + number
            mask = word < N_WORDS
            x = tl.load(source + part * from_values + word, mask=mask, other=0)
            if COPIES:
                tl.store(target + part * to_values + word, x, mask=mask)
            y = x ^ ((part * N_WORDS + word + 1).to(tl.int64) * KEY_STEP)
            # Shifts of signed numbers keep the sign, hence the masks.
            term = (y & low) * ((y >> 32) & low) + ((x << 32) | ((x >> 32) & low))
            total += tl.where(mask, term, 0)
    tl.store(checks_ptr + n * tl.num_programs(1) + head, tl.sum(total))
