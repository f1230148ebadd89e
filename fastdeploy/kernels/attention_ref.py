"""The definition of paged attention: what `attention_decode` and `attention_prefill` are tested against.

Shapes and names are those of the kernels: s sequences, t new tokens one sequence after the other, pages
[n_pages, 2, kv heads, page_tokens, D] of which a sequence's are listed in its row of the page table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_ref(
    q_thd: Tensor, pages: Tensor, page_table_sp: Tensor, n_new_s: Sequence[int], n_context_s: Sequence[int]
) -> Tensor:
    """Causal attention of each sequence's new tokens, its last ones, over its context: [t, heads, D], dtype of q.

    Computed in float64. A sequence without context gives zeros.
    """
    page_tokens, n_kv_heads, head_dim = pages.shape[3], pages.shape[2], pages.shape[4]
    n_sharing = q_thd.shape[1] // n_kv_heads
    out_thd = torch.zeros_like(q_thd)
    row = 0
    for s, (n_new, n_context) in enumerate(zip(n_new_s, n_context_s, strict=True)):
        rows = slice(row, row + n_new)
        row += n_new
        if n_context == 0:
            continue
        used = page_table_sp[s, : -(-n_context // page_tokens)].long()
        kv_2hCd = pages[used].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :n_context].double()
        k_hCd, v_hCd = kv_2hCd.repeat_interleave(n_sharing, 1)
        score_htC = torch.einsum("thd,hcd->htc", q_thd[rows].double(), k_hCd) / head_dim**0.5
        at_C = torch.arange(n_context, device=q_thd.device)
        seen_tC = at_C[None] <= at_C[n_context - n_new :, None]
        weight_htC = score_htC.masked_fill(~seen_tC, -torch.inf).softmax(-1)
        out_thd[rows] = torch.einsum("htc,hcd->thd", weight_htC, v_hCd).to(q_thd.dtype)
    return out_thd
