"""Causal attention of chunks of new tokens over paged keys and values, online softmax (Dao et al., 2022).

A program takes a tile of one sequence's new tokens and one query head, and walks over the context up to the tile's last
token; only the blocks on the diagonal are masked. Tiles run longest first. Imported only where Triton is; the reference
is `attention_ref`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """Tile of queries, block of keys, and how the kernel is compiled."""

    tile: int = 128
    block: int = 64
    n_warps: int = 4
    n_stages: int = 3


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """The tiles of a step's chunks, on the device.

    tile_i4: int32 [i, 4], for each tile: row of its first query among the step's tokens, queries in it (at most the
    tile size), position of the first query, row of `page_table`.
    """

    tile_i4: Tensor
    page_table: Tensor  # int32 [rows, pages]


def cut_tiles(
    first_row_s: NDArray[np.int64],
    n_new_s: NDArray[np.int32],
    n_context_s: NDArray[np.int32],
    table_row_s: NDArray[np.int64],
    tile: int,
) -> NDArray[np.int32]:
    """`PrefillTiles.tile_i4` of chunks, the tiles with the longest contexts first."""
    n_tiles_s = -(-n_new_s // tile)
    seq_i = np.repeat(np.arange(len(n_new_s)), n_tiles_s)
    offset_i = (np.arange(len(seq_i)) - np.repeat(np.cumsum(n_tiles_s) - n_tiles_s, n_tiles_s)) * tile
    tiles = np.stack(
        [
            first_row_s[seq_i] + offset_i,
            np.minimum(n_new_s[seq_i] - offset_i, tile),
            n_context_s[seq_i] - n_new_s[seq_i] + offset_i,
            table_row_s[seq_i],
        ],
        axis=1,
    )
    return np.ascontiguousarray(tiles[np.argsort(-tiles[:, 2], kind="stable")], dtype=np.int32)


def prefill_attention(
    q_thd: Tensor, out_thd: Tensor, pages: Tensor, tiles: PrefillTiles, tuning: PrefillTuning
) -> None:
    """Write the attention of the tiles' queries into their rows of `out_thd`; the other rows stay as they are.

    q [t, heads, D] may be a slice of a larger tensor with contiguous heads; out is contiguous. The tiles must have been
    cut with the tuning's tile size.
    """
    n_tiles = tiles.tile_i4.shape[0]
    if n_tiles == 0:
        return
    n_kv_heads, page_tokens, head_dim = pages.shape[2:]
    n_heads = q_thd.shape[1]
    _prefill_kernel[(n_heads, n_tiles)](
        q_thd,
        out_thd,
        pages,
        tiles.page_table,
        tiles.tile_i4,
        q_thd.stride(0),
        out_thd.stride(0),
        tiles.page_table.stride(0),
        head_dim**-0.5 * 1.4426950408889634,
        N_KV_HEADS=n_kv_heads,
        N_SHARING=n_heads // n_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        TILE=tuning.tile,
        BLOCK=tuning.block,
        STAGES=tuning.n_stages,
        PRECISION="ieee" if q_thd.dtype == torch.float32 else "tf32",
        num_warps=tuning.n_warps,
    )


@triton.jit
def _key_rows(
    table, start, at, inside, kv_head, N_KV_HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Row of each key among all rows of the pages."""
    if PAGE_TOKENS % BLOCK == 0:
        page = tl.load(table + start // PAGE_TOKENS).to(tl.int64)
        return (page * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + at % PAGE_TOKENS
    else:  # noqa: RET505 the compiler must see one branch only
        pages = tl.load(table + at // PAGE_TOKENS, mask=inside, other=0).to(tl.int64)
        return (pages * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + at % PAGE_TOKENS


# A table as wide as the longest context must not mean another kernel for each width.
@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q_ptr,
    out_ptr,
    pages_ptr,
    table_ptr,
    tile_ptr,
    q_stride,
    out_stride,
    table_stride,
    scale,
    N_KV_HEADS: tl.constexpr,
    N_SHARING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_ptr + tile * 4).to(tl.int64)
    n_queries = tl.load(tile_ptr + tile * 4 + 1)
    position = tl.load(tile_ptr + tile * 4 + 2)
    table = table_ptr + tl.load(tile_ptr + tile * 4 + 3).to(tl.int64) * table_stride
    kv_head = head // N_SHARING
    n_context = position + n_queries

    query = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_DIM)
    exists = query < n_queries
    q_at = (row + query[:, None]) * q_stride + head * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + q_at, mask=exists[:, None], other=0.0)

    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, HEAD_DIM), tl.float32)
    # Blocks that every query of the tile sees whole, then those on the diagonal.
    n_whole = (position + 1) // BLOCK * BLOCK
    for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        key_row = _key_rows(table, start, at, at >= 0, kv_head, N_KV_HEADS, PAGE_TOKENS, BLOCK)
        k = tl.load(pages_ptr + key_row[:, None] * HEAD_DIM + dim[None, :])
        score = tl.dot(q, tl.trans(k).to(q.dtype), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        v_row = key_row + N_KV_HEADS * PAGE_TOKENS
        v = tl.load(pages_ptr + v_row[:, None] * HEAD_DIM + dim[None, :])
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        top = new_top
    for start in tl.range(n_whole, n_context, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_context
        key_row = _key_rows(table, start, at, inside, kv_head, N_KV_HEADS, PAGE_TOKENS, BLOCK)
        k = tl.load(pages_ptr + key_row[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k).to(q.dtype), input_precision=PRECISION) * scale
        score = tl.where(at[None, :] <= position + query[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        v_row = key_row + N_KV_HEADS * PAGE_TOKENS
        v = tl.load(pages_ptr + v_row[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        top = new_top
    out_at = (row + query[:, None]) * out_stride + head * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=exists[:, None])
