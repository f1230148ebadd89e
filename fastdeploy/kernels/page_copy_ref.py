"""Copies of KV pages and their check values, in plain torch: what the C and Triton kernels must give.

The check value of a key head in a page is 64 bits over its keys and then its values, W words of 64 bits each. Word
number i is x; with y = x xor (i + 1) * KEY_STEP it adds (low half of y) * (high half of y) + (x with its halves
swapped), all modulo 2^64. A changed, missing or moved word changes the sum; it is no defence against forgery.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
_LOW = 0xFFFFFFFF
_CHUNK_WORDS = 1 << 20  # bounds the memory that the reference needs


def check_pages_ref(pages_n2hW: Tensor) -> Tensor:
    """Check values int64 [n, h] of pages given as int64 [n, 2, h, W]."""
    n, _, n_heads, n_words = pages_n2hW.shape
    number_2hW = torch.arange(1, 2 * n_words + 1, device=pages_n2hW.device).view(2, 1, n_words)
    key_2hW = number_2hW * KEY_STEP
    checks_nh = torch.empty(n, n_heads, dtype=torch.int64, device=pages_n2hW.device)
    n_chunk = max(1, _CHUNK_WORDS // (2 * n_heads * n_words))
    for first in range(0, n, n_chunk):
        x = pages_n2hW[first : first + n_chunk]
        y = x ^ key_2hW
        terms = (y & _LOW) * (y >> 32 & _LOW) + (x << 32 | (x >> 32 & _LOW))
        checks_nh[first : first + n_chunk] = terms.sum((1, 3))
    return checks_nh


def copy_pages_ref(from_p2hW: Tensor, from_ids: Tensor, to_p2hW: Tensor | None, to_ids: Tensor | None) -> Tensor:
    """Copy pages `from_ids` (int64 [n]) to pages `to_ids`, and give their check values, int64 [n, h].

    Both are int64 [pages, 2, h, W] with the last two axes contiguous: views of the same heads at two places. Without
    `to_p2hW` nothing is copied.
    """
    pages_n2hW = from_p2hW[from_ids]
    if to_p2hW is not None and to_ids is not None:
        to_p2hW[to_ids] = pages_n2hW
    return check_pages_ref(pages_n2hW)
