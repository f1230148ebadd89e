"""Attention of one query per sequence over paged keys and values: split along the context, joined in the same launch.

A program takes one kv head of one sequence and one part of its context, with the query heads that share the kv head as
the rows of its matrix products. The program that finishes last of a sequence's parts joins them, so that a short
context costs one launch and a long one still fills the GPU. What rotates the new token's query and key and stores its
key and value is in it as well, for steps in which every row decodes. Imported only where Triton is; the reference is
`attention_ref`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.kernels.rope_kv import turned

_PROGRAMS_PER_SM = 4
_MIN_SPLITS, _MAX_SPLITS = 4, 32
_MIN_ROWS = 16  # of a matrix product


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How the kernel cuts its work.

    A program reads at least `min_split` tokens of a context; where the sequences alone fill the GPU, at least
    `min_split_full`, as cutting then only helps when some contexts are much longer than others.
    """

    block: int
    n_warps: int
    n_stages: int
    min_split: int
    min_split_full: int = 2048


_FEW_SEQS = DecodeTuning(block=64, n_warps=2, n_stages=3, min_split=64)
_SOME_SEQS = DecodeTuning(block=64, n_warps=2, n_stages=3, min_split=128)
_MANY_SEQS = DecodeTuning(block=32, n_warps=2, n_stages=4, min_split=256)


def decode_tuning(n_seqs: int) -> DecodeTuning:
    """What measured best on an H200 with 4 kv heads of 128: few sequences wait for latency, many for bandwidth."""
    if n_seqs <= 32:
        return _FEW_SEQS
    return _SOME_SEQS if n_seqs <= 128 else _MANY_SEQS


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Which tokens decode, on the device; all int32 [s].

    row_s: the query's row among the step's tokens; table_row_s: the sequence's row in `page_table`; n_context_s: keys
    to see, the query's own included (0 gives zeros).
    """

    row_s: Tensor
    table_row_s: Tensor
    n_context_s: Tensor
    page_table: Tensor  # int32 [rows, pages]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What the kernel needs to do `rope_and_store`'s work for its rows.

    qkv_thd: contiguous [t, heads + 2 kv heads, D], not rotated yet; rotation_td complex64 [t, D/2]; slot_s: where row
    s's key and value go, of an integer type, below 0 for nowhere: they are seen by this row's query all the same.
    """

    qkv_thd: Tensor
    rotation_td: Tensor
    slot_s: Tensor


class DecodeScratch:
    """Memory for the parts of up to `max_seqs` sequences; calls on one stream may share it."""

    def __init__(self, max_seqs: int, n_heads: int, n_kv_heads: int, head_dim: int, device: torch.device) -> None:
        n_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.n_programs = _PROGRAMS_PER_SM * n_sms
        self.n_kv_heads = n_kv_heads
        n_parts = max(self._n_parts(n) for n in range(1, max_seqs + 1))
        n_sharing = n_heads // n_kv_heads
        self.out_pgd = torch.empty((n_parts * n_kv_heads, n_sharing, head_dim), dtype=torch.float32, device=device)
        self.lse_pg = torch.empty((n_parts * n_kv_heads, n_sharing), dtype=torch.float32, device=device)
        self.n_done = torch.zeros(max_seqs * n_kv_heads, dtype=torch.int32, device=device)

    def is_full(self, n_seqs: int) -> bool:
        """Whether one program for each sequence and kv head is enough for the GPU."""
        return n_seqs * self.n_kv_heads * 2 > self.n_programs

    def n_splits(self, n_seqs: int) -> int:
        """Most parts of a context: what fills the GPU, a power of two so that few kernels are compiled."""
        wanted = self.n_programs // (n_seqs * self.n_kv_heads)
        return min(_MAX_SPLITS, max(_MIN_SPLITS, int(triton.next_power_of_2(max(wanted, 1)))))

    def _n_parts(self, n_seqs: int) -> int:
        return n_seqs * self.n_splits(n_seqs)


def decode_attention(
    q_thd: Tensor,
    out_thd: Tensor,
    pages: Tensor,
    rows: DecodeRows,
    scratch: DecodeScratch,
    tuning: DecodeTuning,
    new: NewTokens | None = None,
) -> None:
    """Write the attention of the rows' queries into their rows of `out_thd`; the other rows stay as they are.

    q [t, heads, D] may be a slice of a larger tensor with contiguous heads; out is contiguous. With `new`, q is of its
    qkv, which stays as it is, and what it describes becomes the last token of each context; no context is 0 then.
    """
    n_seqs = rows.row_s.shape[0]
    if n_seqs == 0:
        return
    n_kv_heads, page_tokens, head_dim = pages.shape[2:]
    n_sharing = q_thd.shape[1] // n_kv_heads
    n_splits, pdl = scratch.n_splits(n_seqs), overlaps(q_thd.device)
    min_split = tuning.min_split_full if scratch.is_full(n_seqs) else tuning.min_split
    _decode_kernel[(n_kv_heads, n_seqs, n_splits)](
        q_thd,
        out_thd,
        pages,
        rows.page_table,
        rows.row_s,
        rows.table_row_s,
        rows.n_context_s,
        scratch.out_pgd,
        scratch.lse_pg,
        scratch.n_done,
        scratch.lse_pg if new is None else torch.view_as_real(new.rotation_td),
        rows.row_s if new is None else new.slot_s,
        q_thd.stride(0),
        out_thd.stride(0),
        rows.page_table.stride(0),
        head_dim**-0.5 * 1.4426950408889634,
        N_KV_HEADS=n_kv_heads,
        N_SHARING=n_sharing,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(n_sharing)),
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK=tuning.block,
        N_SPLITS=n_splits,
        MIN_BLOCKS=max(1, min_split // tuning.block),
        STAGES=tuning.n_stages,
        PRECISION="ieee" if q_thd.dtype == torch.float32 else "tf32",
        NEW=new is not None,
        PDL=pdl,
        num_warps=tuning.n_warps,
        launch_pdl=pdl,
    )


# A table as wide as the longest context must not mean another kernel for each width.
@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(  # noqa: PLR0915 one kernel, one launch
    q_ptr,
    out_ptr,
    pages_ptr,
    table_ptr,
    row_ptr,
    table_row_ptr,
    n_context_ptr,
    part_out_ptr,
    part_lse_ptr,
    n_done_ptr,
    rotation_ptr,
    slot_ptr,
    q_stride,
    out_stride,
    table_stride,
    scale,
    N_KV_HEADS: tl.constexpr,
    N_SHARING: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    N_SPLITS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The kernel right before this one made q; all else that is read here is older.
    n_context = tl.load(n_context_ptr + seq)
    if NEW:
        n_context -= 1  # in pages; the new token comes from qkv
    n_blocks = tl.cdiv(n_context, BLOCK)
    blocks_each = tl.maximum(tl.cdiv(n_blocks, N_SPLITS), MIN_BLOCKS)
    n_used = tl.maximum(tl.cdiv(n_blocks, blocks_each), 1)
    if split >= n_used:
        await_previous(PDL)
        return
    first = split * blocks_each * BLOCK
    last = tl.minimum(first + blocks_each * BLOCK, n_context)

    row = tl.load(row_ptr + seq).to(tl.int64)
    table = table_ptr + tl.load(table_row_ptr + seq).to(tl.int64) * table_stride
    member = tl.arange(0, ROWS)
    exists = member < N_SHARING
    head = kv_head * N_SHARING + member
    dim = tl.arange(0, HEAD_DIM)
    if NEW:
        turn = tl.load(rotation_ptr + row * HEAD_DIM + dim)
        slot = tl.load(slot_ptr + seq).to(tl.int64)
    await_previous(PDL)
    q = tl.load(q_ptr + row * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=exists[:, None], other=0.0)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    if NEW:
        q = turned(q, turn, ROWS, HEAD_DIM)
        if split == n_used - 1:  # this program's last key is the new one, with which its sums begin
            k_at = q_ptr + row * q_stride + (N_KV_HEADS * N_SHARING + kv_head) * HEAD_DIM + dim[None, :]
            k = turned(tl.load(k_at), turn, 1, HEAD_DIM).to(pages_ptr.dtype.element_ty)
            v = tl.load(k_at + N_KV_HEADS * HEAD_DIM).to(pages_ptr.dtype.element_ty)
            if slot >= 0:
                key_row = (slot // PAGE_TOKENS * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + slot % PAGE_TOKENS
                into = pages_ptr + key_row * HEAD_DIM + dim[None, :]
                tl.store(into, k)
                tl.store(into + N_KV_HEADS * PAGE_TOKENS * HEAD_DIM, v)
            top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
            total += 1.0
            acc += v.to(tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        counts = at < n_context
        if PAGE_TOKENS % BLOCK == 0:
            page = tl.load(table + start // PAGE_TOKENS).to(tl.int64)
            key_row = (page * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + at % PAGE_TOKENS
        else:
            pages = tl.load(table + at // PAGE_TOKENS, mask=counts, other=0).to(tl.int64)
            key_row = (pages * 2 * N_KV_HEADS + kv_head) * PAGE_TOKENS + at % PAGE_TOKENS
        k = tl.load(pages_ptr + key_row[:, None] * HEAD_DIM + dim[None, :], mask=counts[:, None], other=0.0)
        v_row = key_row + N_KV_HEADS * PAGE_TOKENS
        v = tl.load(pages_ptr + v_row[:, None] * HEAD_DIM + dim[None, :], mask=counts[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k).to(q.dtype), input_precision=PRECISION) * scale
        score = tl.where(counts[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        top = new_top

    some = total > 0
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    out_at = out_ptr + row * out_stride
    if n_used == 1:
        into = out_at + head[:, None] * HEAD_DIM + dim[None, :]
        tl.store(into, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None])
    else:
        lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        pair = seq * N_KV_HEADS + kv_head
        part = (pair * N_SPLITS + split).to(tl.int64) * N_SHARING + member
        tl.store(part_out_ptr + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=exists[:, None])
        tl.store(part_lse_ptr + part, lse, mask=exists)
        # The barrier orders every thread's stores before the count, which publishes them.
        tl.debug_barrier()
        n_before = tl.atomic_add(n_done_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if n_before == n_used - 1:
            tl.store(n_done_ptr + pair, 0)
            # Loads of four parts at a time are under way together: their latency is what the join costs.
            top = tl.full((ROWS,), -1e30, tl.float32)  # finite: no part may be -inf less -inf
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
            for group in range(0, n_used, 4):
                for i in tl.static_range(4):
                    written = exists & (group + i < n_used)
                    part = (pair * N_SPLITS + group + i).to(tl.int64) * N_SHARING + member
                    lse = tl.load(part_lse_ptr + part, mask=written, other=float("-inf"), cache_modifier=".cg")
                    part_out = tl.load(
                        part_out_ptr + part[:, None] * HEAD_DIM + dim[None, :],
                        mask=written[:, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_top = tl.maximum(top, lse)
                    shrink = tl.exp2(top - new_top)
                    weight = tl.exp2(lse - new_top)
                    total = total * shrink + weight
                    acc = acc * shrink[:, None] + part_out * weight[:, None]
                    top = new_top
            into = out_at + head[:, None] * HEAD_DIM + dim[None, :]
            tl.store(
                into,
                (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty),
                mask=exists[:, None],
            )
