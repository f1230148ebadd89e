"""Rotate queries and keys in place and put keys and values into their pages, in one pass over a step's tokens.

Pages are [n_pages, 2, kv heads, page_tokens, D]: keys, then values, each head's tokens side by side. Imported only
where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.layers.rotary import rotate_

_FEW_HEADS = 4  # of a program, where tokens alone do not fill the device
_MANY_TOKENS = 1024  # from here on a program takes a whole token


def rope_and_store_ref(qkv_thd: Tensor, rotation_td: Tensor, slot_t: Tensor, pages: Tensor) -> None:
    """Rotate all heads of qkv [t, heads + 2 kv heads, D] but the values; store keys and values at `slot_t`.

    `rotation_td` complex64 [t, D/2] turns neighbouring pairs. `slot_t` is page * page_tokens + offset, below 0 for a
    token that is not to be stored.
    """
    n_kv_heads, page_tokens = pages.shape[2], pages.shape[3]
    n_heads = qkv_thd.shape[1] - 2 * n_kv_heads
    rotate_(qkv_thd[:, : n_heads + n_kv_heads], rotation_td)
    kept_t = slot_t >= 0
    page_t, offset_t = slot_t[kept_t] // page_tokens, slot_t[kept_t] % page_tokens
    kv_t2hd = qkv_thd[kept_t, n_heads:].unflatten(1, (2, n_kv_heads)).to(pages.dtype)
    pages[page_t, :, :, offset_t] = kv_t2hd


def rope_and_store(qkv_thd: Tensor, rotation_td: Tensor, slot_t: Tensor, pages: Tensor) -> None:
    """As the reference; qkv is contiguous, `slot_t` of an integer type."""
    n_tokens, n_all_heads, head_dim = qkv_thd.shape
    if n_tokens == 0:
        return
    n_kv_heads, page_tokens = pages.shape[2], pages.shape[3]
    pdl = overlaps(qkv_thd.device)
    heads = _FEW_HEADS if n_tokens < _MANY_TOKENS else triton.next_power_of_2(n_all_heads)
    grid = (n_tokens, triton.cdiv(n_all_heads, heads))
    _rope_kv_kernel[grid](
        qkv_thd,
        torch.view_as_real(rotation_td),
        slot_t,
        pages,
        N_HEADS=n_all_heads - 2 * n_kv_heads,
        N_KV_HEADS=n_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_HEADS=heads,
        PDL=pdl,
        num_warps=max(1, heads // 8),
        launch_pdl=pdl,
    )


@triton.jit
def turned(x, turn, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """x [ROWS, HEAD_DIM], neighbouring pairs turned by `turn` [HEAD_DIM], cosines and sines side by side."""
    cos, sin = tl.split(tl.reshape(turn, (HEAD_DIM // 2, 2)))
    real, imag = tl.split(tl.reshape(x.to(tl.float32), (ROWS, HEAD_DIM // 2, 2)))
    turned_real = real * cos[None, :] - imag * sin[None, :]
    turned_imag = real * sin[None, :] + imag * cos[None, :]
    return tl.reshape(tl.join(turned_real, turned_imag), (ROWS, HEAD_DIM)).to(x.dtype)


@triton.jit
def _rope_kv_kernel(
    qkv_ptr,
    rotation_ptr,
    slot_ptr,
    pages_ptr,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    n_all: tl.constexpr = N_HEADS + 2 * N_KV_HEADS
    exists = head < n_all
    turns = head < N_HEADS + N_KV_HEADS
    is_kv = exists & (head >= N_HEADS)
    dim = tl.arange(0, HEAD_DIM)
    at = (token * n_all + head[:, None]) * HEAD_DIM + dim[None, :]
    x = tl.load(qkv_ptr + at, mask=exists[:, None], other=0.0)
    turn = tl.load(rotation_ptr + token * HEAD_DIM + dim)
    y = tl.where(turns[:, None], turned(x, turn, BLOCK_HEADS, HEAD_DIM), x)
    tl.store(qkv_ptr + at, y, mask=turns[:, None])
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // PAGE_TOKENS, slot % PAGE_TOKENS
        # Key heads and then value heads, which is also the order of the page.
        row = (page * 2 * N_KV_HEADS + (head - N_HEADS)) * PAGE_TOKENS + offset
        into = row[:, None] * HEAD_DIM + dim[None, :]
        tl.store(pages_ptr + into, y.to(pages_ptr.dtype.element_ty), mask=is_kv[:, None])
