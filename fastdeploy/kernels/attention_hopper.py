"""Prefill attention on Hopper with warps that have one job each: `attention_prefill` for bfloat16 heads of 128.

One warp fetches keys and values from their pages with the copy engine; two groups of four warps take 64 queries each.
While one group works out its softmax, the other keeps the tensor cores busy (Shah et al., 2024). Written in Gluon,
Triton's lower level: its compiler does not divide the work of warps on Hopper by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_HEAD_DIM = 128
_QUERIES = 64  # of each multiplying group
_KEYS = 64  # a page holds whole blocks of these; a turn takes two
_STAGES = 2
_N_WARPS = 4  # of the first multiplying group

TILE = 2 * _QUERIES


def fits_hopper(device: torch.device, dtype: torch.dtype, head_dim: int, page_tokens: int) -> bool:
    """Whether this kernel can take such heads and pages on this device."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and dtype == torch.bfloat16 and head_dim == _HEAD_DIM and page_tokens % _KEYS == 0


def prefill_attention_hopper(
    q_thd: Tensor, out_thd: Tensor, pages: Tensor, tile_i4: Tensor, page_table: Tensor
) -> None:
    """As `prefill_attention`, for tiles of `TILE` queries."""
    n_tiles, n_heads = tile_i4.shape[0], q_thd.shape[1]
    n_kv_heads, page_tokens = pages.shape[2:4]
    if n_tiles == 0:
        return
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptor = TensorDescriptor.from_tensor(pages.view(-1, _HEAD_DIM), [_KEYS, _HEAD_DIM], layout)
    _kernel[(n_heads, n_tiles)](
        descriptor, q_thd, out_thd, page_table, tile_i4, q_thd.stride(0), out_thd.stride(0), page_table.stride(0),
        _HEAD_DIM**-0.5 * 1.4426950408889634, n_kv_heads, n_heads // n_kv_heads, page_tokens, _STAGES,
        num_warps=_N_WARPS,
    )  # fmt: skip


@gluon.jit
def _fetch(
    pages_desc, k_bufs, v_bufs, k_full, k_empty, v_full, v_empty, table, n_context, kv_head,
    N_KV_HEADS: gl.constexpr, PAGE_TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: two blocks of keys, two of values a turn, as soon as both groups have let go of a slot."""
    KEYS: gl.constexpr = pages_desc.block_type.shape[0]
    n_bytes: gl.constexpr = 2 * KEYS * pages_desc.block_type.shape[1] * 2
    n_blocks = (n_context + KEYS - 1) // KEYS
    for i in range((n_blocks + 1) // 2):
        slot, phase = i % STAGES, ((i // STAGES) & 1) ^ 1
        at0 = 2 * i * KEYS
        at1 = gl.minimum(2 * i + 1, n_blocks - 1) * KEYS  # behind the last block any other will do: it is masked
        page0, page1 = gl.load(table + at0 // PAGE_TOKENS), gl.load(table + at1 // PAGE_TOKENS)
        row0 = (page0 * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + at0 % PAGE_TOKENS
        row1 = (page1 * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + at1 % PAGE_TOKENS
        mbarrier.wait(k_empty.index(slot), phase)
        bar = k_full.index(slot)
        mbarrier.expect(bar, n_bytes)
        tma.async_copy_global_to_shared(pages_desc, [row0, 0], bar, k_bufs.index(2 * slot))
        tma.async_copy_global_to_shared(pages_desc, [row1, 0], bar, k_bufs.index(2 * slot + 1))
        mbarrier.wait(v_empty.index(slot), phase)
        bar = v_full.index(slot)
        mbarrier.expect(bar, n_bytes)
        to_values: gl.constexpr = N_KV_HEADS * PAGE_TOKENS
        tma.async_copy_global_to_shared(pages_desc, [row0 + to_values, 0], bar, v_bufs.index(2 * slot))
        tma.async_copy_global_to_shared(pages_desc, [row1 + to_values, 0], bar, v_bufs.index(2 * slot + 1))


@gluon.jit
def _mask(score, first, query_at, layout: gl.constexpr):
    """Scores of keys behind the query's own position are nothing."""
    key_at = first + gl.arange(0, score.shape[1], layout=gl.SliceLayout(0, layout))
    return gl.where(gl.expand_dims(key_at, 0) <= gl.expand_dims(query_at, 1), score, float("-inf"))


@gluon.jit
def _softmax(score0, score1, top, total, acc, scale, into: gl.constexpr, weights: gl.constexpr):
    """One turn of the online softmax: weights of both blocks as operands, and the sums so far, scaled down."""
    new_top = gl.maximum(top, gl.maximum(gl.max(score0, 1), gl.max(score1, 1)) * scale)
    weight0 = gl.exp2(score0 * scale - gl.expand_dims(new_top, 1))
    weight1 = gl.exp2(score1 * scale - gl.expand_dims(new_top, 1))
    shrink = gl.exp2(top - new_top)
    total = total * shrink + gl.sum(weight0, 1) + gl.sum(weight1, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, into)), 1)
    part0 = gl.convert_layout(weight0.to(gl.bfloat16), weights)
    part1 = gl.convert_layout(weight1.to(gl.bfloat16), weights)
    return part0, part1, new_top, total, acc


@gluon.jit
def _multiply(  # noqa: PLR0915 one loop, and what comes before and after it
    HALF: gl.constexpr, k_bufs, v_bufs, k_full, k_empty, v_full, v_empty, q_ptr, out_ptr, row, n_queries, position,
    head, q_stride, out_stride, scale, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: queries HALF * 64 to HALF * 64 + 63 of the tile."""
    QUERIES: gl.constexpr = 64
    D: gl.constexpr = 128
    KEYS: gl.constexpr = k_bufs.shape[1]
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    into: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    weights: gl.constexpr = gl.DotOperandLayout(0, into, 2)
    mine = gl.minimum(n_queries - HALF * QUERIES, QUERIES)
    if mine > 0:
        flat_query = HALF * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, flat))
        dim = gl.arange(0, D, layout=gl.SliceLayout(0, flat))
        flat_row = gl.expand_dims((row + flat_query).to(gl.int64), 1)
        exists = gl.expand_dims(flat_query < n_queries, 1)
        at = gl.expand_dims(head * D + dim, 0)
        q = gl.load(q_ptr + flat_row * q_stride + at, mask=exists, other=0.0)
        q = gl.convert_layout(q, gl.DotOperandLayout(0, scores, 2))
        first = position + HALF * QUERIES
        query_at = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, scores))
        n_whole = (first + 1) // (2 * KEYS)
        n_turns = (first + mine + 2 * KEYS - 1) // (2 * KEYS)
        zero = gl.zeros((QUERIES, KEYS), gl.float32, scores)
        acc = gl.zeros((QUERIES, D), gl.float32, into)
        total = gl.zeros((QUERIES,), gl.float32, gl.SliceLayout(1, scores))
        top = gl.full((QUERIES,), float("-inf"), gl.float32, gl.SliceLayout(1, scores))

        mbarrier.wait(k_full.index(0), 0)
        s0 = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s1 = warpgroup_mma(q, k_bufs.index(1).permute((1, 0)), zero, use_acc=False, is_async=True)
        score0, score1 = warpgroup_mma_wait(0, deps=[s0, s1])
        mbarrier.arrive(k_empty.index(0), count=1)
        for i in range(n_turns - 1):
            if i >= n_whole:
                score0 = _mask(score0, 2 * i * KEYS, query_at, scores)
                score1 = _mask(score1, (2 * i + 1) * KEYS, query_at, scores)
            part0, part1, top, total, acc = _softmax(score0, score1, top, total, acc, scale, into, weights)
            slot, after = i % STAGES, (i + 1) % STAGES
            mbarrier.wait(k_full.index(after), ((i + 1) // STAGES) & 1)
            s0 = warpgroup_mma(q, k_bufs.index(2 * after).permute((1, 0)), zero, use_acc=False, is_async=True)
            s1 = warpgroup_mma(q, k_bufs.index(2 * after + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), (i // STAGES) & 1)
            sum_acc = warpgroup_mma(part0, v_bufs.index(2 * slot), acc, is_async=True)
            sum_acc = warpgroup_mma(part1, v_bufs.index(2 * slot + 1), sum_acc, is_async=True)
            score0, score1, acc = warpgroup_mma_wait(0, deps=[s0, s1, sum_acc])
            mbarrier.arrive(k_empty.index(after), count=1)
            mbarrier.arrive(v_empty.index(slot), count=1)
        i = n_turns - 1
        score0 = _mask(score0, 2 * i * KEYS, query_at, scores)
        score1 = _mask(score1, (2 * i + 1) * KEYS, query_at, scores)
        part0, part1, top, total, acc = _softmax(score0, score1, top, total, acc, scale, into, weights)
        mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
        sum_acc = warpgroup_mma(part0, v_bufs.index(2 * (i % STAGES)), acc, is_async=True)
        sum_acc = warpgroup_mma(part1, v_bufs.index(2 * (i % STAGES) + 1), sum_acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[sum_acc])
        mbarrier.arrive(v_empty.index(i % STAGES), count=1)
        acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, into)), 1)
        out = gl.convert_layout(acc.to(gl.bfloat16), flat)
        gl.store(out_ptr + flat_row * out_stride + at, out, mask=exists)
    else:  # nothing to do, but slots are free only when both groups say so
        for i in range((position + n_queries + 2 * KEYS - 1) // (2 * KEYS)):
            slot, phase = i % STAGES, (i // STAGES) & 1
            mbarrier.wait(k_full.index(slot), phase)
            mbarrier.arrive(k_empty.index(slot), count=1)
            mbarrier.wait(v_full.index(slot), phase)
            mbarrier.arrive(v_empty.index(slot), count=1)


@gluon.jit(do_not_specialize=["table_stride"])
def _kernel(
    pages_desc, q_ptr, out_ptr, table_ptr, tile_ptr, q_stride, out_stride, table_stride, scale,
    N_KV_HEADS: gl.constexpr, N_SHARING: gl.constexpr, PAGE_TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = pages_desc.block_type.shape[0]
    D: gl.constexpr = pages_desc.block_type.shape[1]
    k_bufs = gl.allocate_shared_memory(pages_desc.dtype, [2 * STAGES, KEYS, D], pages_desc.layout)
    v_bufs = gl.allocate_shared_memory(pages_desc.dtype, [2 * STAGES, KEYS, D], pages_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    head, tile = gl.program_id(0), gl.program_id(1)
    row = gl.load(tile_ptr + tile * 4)
    n_queries = gl.load(tile_ptr + tile * 4 + 1)
    position = gl.load(tile_ptr + tile * 4 + 2)
    table = table_ptr + gl.load(tile_ptr + tile * 4 + 3).to(gl.int64) * table_stride
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, k_bufs, v_bufs, k_full, k_empty, v_full, v_empty, q_ptr, out_ptr, row, n_queries, position,
                    head, q_stride, out_stride, scale, STAGES,
                ),
            ),
            (
                _multiply,
                (
                    1, k_bufs, v_bufs, k_full, k_empty, v_full, v_empty, q_ptr, out_ptr, row, n_queries, position,
                    head, q_stride, out_stride, scale, STAGES,
                ),
            ),
            (
                _fetch,
                (
                    pages_desc, k_bufs, v_bufs, k_full, k_empty, v_full, v_empty, table, position + n_queries,
                    head // N_SHARING, N_KV_HEADS, PAGE_TOKENS, STAGES,
                ),
            ),
        ],
        [4, 1],  # warps and registers of the second multiplying group and of the fetching warp
        [232, 24],
    )  # fmt: skip
