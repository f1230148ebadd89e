"""Decode and prefill kernels against the definition, and the backend against it over whole schedules of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton_device import DEVICE, DTYPES, TOLERANCE, needs_triton, poison, relative_error

from fastdeploy.config.schema import RopeShape
from fastdeploy.layers.attention.base import AttentionShape, BatchLayout, DecodeBatch
from fastdeploy.layers.rotary import rotations
from fastdeploy.runner.step import StepContext

# The interpreter turns arrays of one element into numbers in a way that numpy is about to refuse.
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    needs_triton,
]

HEADS = [(20, 4, 128, 64), (4, 4, 64, 16), (6, 1, 64, 48), (8, 2, 128, 128)]  # heads, kv heads, size, page


class PagedContexts:
    """Random keys and values of sequences over scattered pages; what does not belong to one is huge."""

    def __init__(self, heads: tuple[int, int, int, int], n_context_s: list[int], dtype: torch.dtype) -> None:
        self.n_heads, self.n_kv_heads, self.head_dim, self.page_tokens = heads
        self.n_context_s = n_context_s
        used_s = [-(-n // self.page_tokens) for n in n_context_s]
        n_pages = sum(used_s) + 2
        free = iter(torch.randperm(n_pages).tolist())
        table_sp = np.random.default_rng(0).integers(0, n_pages, (len(used_s), max(used_s, default=0) + 1))
        size = (n_pages, 2, self.n_kv_heads, self.page_tokens, self.head_dim)
        self.pages = torch.full(size, 1e4, device=DEVICE, dtype=dtype)
        for s, n_used in enumerate(used_s):
            for p in range(n_used):
                table_sp[s, p] = page = next(free)
                n_here = min(self.page_tokens, n_context_s[s] - p * self.page_tokens)
                part = self.pages[page, :, :, :n_here]
                part.copy_(torch.randn(part.shape, device=DEVICE))
        self.table_sp = torch.from_numpy(table_sp.astype(np.int32)).to(DEVICE)


def int32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int32)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_context_s", [[1], [0], [300], [5, 0, 64, 65, 129, 1], [2500, 3]], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_kernel(heads: tuple[int, int, int, int], n_context_s: list[int], dtype: torch.dtype) -> None:
    from fastdeploy.kernels.attention_decode import DecodeRows, DecodeScratch, decode_attention, decode_tuning
    from fastdeploy.kernels.attention_ref import attention_ref

    contexts = PagedContexts(heads, n_context_s, dtype)
    n_seqs, (n_heads, n_kv_heads, head_dim, _) = len(n_context_s), heads
    qkv_thd = torch.randn(n_seqs + 2, n_heads + 2 * n_kv_heads, head_dim, device=DEVICE).to(dtype)
    q_thd = qkv_thd[:, :n_heads]
    row_s = torch.randperm(n_seqs + 2)[:n_seqs].sort().values
    table_row_s = torch.randperm(n_seqs)
    table_sp = contexts.table_sp.clone()
    table_sp[table_row_s] = contexts.table_sp
    scratch = DecodeScratch(n_seqs, n_heads, n_kv_heads, head_dim, DEVICE)
    rows = DecodeRows(int32(row_s), int32(table_row_s), int32(n_context_s), table_sp)
    expected_shd = attention_ref(q_thd[row_s.to(DEVICE)], contexts.pages, contexts.table_sp, [1] * n_seqs, n_context_s)
    for n_tuned in (1, 64, 1):  # the counters must be back at zero after a call
        out_thd = poison(torch.empty(n_seqs + 2, n_heads, head_dim, device=DEVICE, dtype=dtype))
        decode_attention(q_thd, out_thd, contexts.pages, rows, scratch, decode_tuning(n_tuned))
        assert relative_error(out_thd[row_s.to(DEVICE)], expected_shd) < TOLERANCE[dtype]
        untouched = [row for row in range(n_seqs + 2) if row not in row_s.tolist()]
        assert bool(out_thd[untouched].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_context_s", [[1], [300], [2, 64, 65, 66, 129, 1], [2500, 3]], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_kernel_that_takes_new_tokens_in(
    heads: tuple[int, int, int, int], n_context_s: list[int], dtype: torch.dtype
) -> None:
    from fastdeploy.kernels.attention_decode import (
        DecodeRows,
        DecodeScratch,
        NewTokens,
        decode_attention,
        decode_tuning,
    )
    from fastdeploy.kernels.attention_ref import attention_ref
    from fastdeploy.kernels.rope_kv import rope_and_store_ref

    contexts = PagedContexts(heads, n_context_s, dtype)
    n_seqs, (n_heads, n_kv_heads, head_dim, page_tokens) = len(n_context_s), heads
    rotation_sd = rotations(RopeShape(theta=1e4, style="interleaved"), head_dim, 50, torch.device("cpu"))
    rotation_sd = rotation_sd[torch.randint(0, 50, (n_seqs,))].to(DEVICE)
    qkv_shd = torch.randn(n_seqs, n_heads + 2 * n_kv_heads, head_dim, device=DEVICE).to(dtype)
    last_s = torch.tensor(n_context_s) - 1
    slot_s = contexts.table_sp.cpu()[torch.arange(n_seqs), last_s // page_tokens] * page_tokens + last_s % page_tokens
    slot_s = slot_s.to(DEVICE)
    turned_shd, expected_pages = qkv_shd.clone(), contexts.pages.clone()
    rope_and_store_ref(turned_shd, rotation_sd, slot_s.long(), expected_pages)
    expected_shd = attention_ref(turned_shd[:, :n_heads], expected_pages, contexts.table_sp, [1] * n_seqs, n_context_s)
    # The first sequence once more, as rows that fill up a batch: it sees its new token and stores nothing.
    order = torch.tensor([*range(n_seqs), 0], device=DEVICE)
    qkv_shd, rotation_sd, slot_s = qkv_shd[order], rotation_sd[order], slot_s[order].int()
    slot_s[-1] = -1
    expected_shd = expected_shd[order]
    scratch = DecodeScratch(n_seqs + 1, n_heads, n_kv_heads, head_dim, DEVICE)
    contexts_s = int32([*n_context_s, n_context_s[0]])
    rows = DecodeRows(int32(range(n_seqs + 1)), order.int(), contexts_s, contexts.table_sp)
    for n_tuned in (1, 64, 300):
        pages, out_shd = contexts.pages.clone(), poison(torch.empty_like(qkv_shd[:, :n_heads]))
        new, before_shd = NewTokens(qkv_shd, rotation_sd, slot_s), qkv_shd.clone()
        decode_attention(qkv_shd[:, :n_heads], out_shd, pages, rows, scratch, decode_tuning(n_tuned), new)
        assert relative_error(out_shd, expected_shd) < TOLERANCE[dtype]
        assert relative_error(pages, expected_pages) < TOLERANCE[dtype]
        assert torch.equal(pages == contexts.pages, expected_pages == contexts.pages)  # nothing else was written
        assert torch.equal(qkv_shd, before_shd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chunks",  # new tokens and context of each sequence
    [[(2, 2)], [(130, 130)], [(3, 200), (64, 64), (129, 260)], [(65, 400), (2, 3)]],
    ids=str,
)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill_kernel(heads: tuple[int, int, int, int], chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
    from fastdeploy.kernels.attention_hopper import TILE, fits_hopper, prefill_attention_hopper
    from fastdeploy.kernels.attention_prefill import PrefillTiles, PrefillTuning, cut_tiles, prefill_attention
    from fastdeploy.kernels.attention_ref import attention_ref

    n_new_s, n_context_s = [new for new, _ in chunks], [context for _, context in chunks]
    contexts = PagedContexts(heads, n_context_s, dtype)
    n_heads, n_kv_heads, head_dim, _ = heads
    n_tokens = sum(n_new_s)
    qkv_thd = torch.randn(n_tokens + 1, n_heads + 2 * n_kv_heads, head_dim, device=DEVICE).to(dtype)
    q_thd = qkv_thd[1:, :n_heads]
    expected_thd = attention_ref(q_thd, contexts.pages, contexts.table_sp, n_new_s, n_context_s)
    tuning = PrefillTuning()
    first_s = 1 + np.cumsum(n_new_s) - n_new_s
    arrays = (np.array(n_new_s, np.int32), np.array(n_context_s, np.int32))
    tiles = PrefillTiles(int32(cut_tiles(first_s, *arrays, np.arange(len(chunks)), tuning.tile)), contexts.table_sp)
    out_thd = poison(torch.empty(n_tokens + 1, n_heads, head_dim, device=DEVICE, dtype=dtype))
    prefill_attention(qkv_thd[:, :n_heads], out_thd, contexts.pages, tiles, tuning)
    assert relative_error(out_thd[1:], expected_thd) < TOLERANCE[dtype]
    assert bool(out_thd[0].isnan().all())
    if fits_hopper(DEVICE, dtype, head_dim, heads[3]):
        assert tuning.tile == TILE
        prefill_attention_hopper(qkv_thd[:, :n_heads], poison(out_thd), contexts.pages, tiles.tile_i4, tiles.page_table)
        assert relative_error(out_thd[1:], expected_thd) < TOLERANCE[dtype]
        assert bool(out_thd[0].isnan().all())


SCHEDULE: list[dict[int, int]] = [  # new tokens of each sequence, step by step
    {0: 10, 1: 130, 4: 1},
    {0: 1, 2: 20, 1: 1, 4: 1},
    {2: 7, 1: 1, 3: 1, 0: 1},
    {},
    {3: 70, 2: 1},
    {0: 1, 1: 1, 2: 1, 3: 1, 4: 1},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(20, 4, 128, 64), (6, 3, 64, 16)], ids=str)
def test_backend_over_steps_of_mixed_batches(heads: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from fastdeploy.kernels.attention_ref import attention_ref
    from fastdeploy.kernels.rope_kv import rope_and_store_ref
    from fastdeploy.layers.attention.triton import TritonAttention

    n_heads, n_kv_heads, head_dim, page_tokens = heads
    shape = AttentionShape(
        n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, page_tokens=page_tokens
    )
    backend = TritonAttention(shape, dtype, DEVICE)
    pages_l = backend.allocate(64)
    expected_pages = pages_l[1].clone()
    free = torch.randperm(64).tolist()
    table_sp = np.zeros((5, 16), np.int32)
    n_context_s = np.zeros(5, np.int32)
    rotation_pd = rotations(RopeShape(theta=1e4, style="interleaved"), head_dim, 512, torch.device("cpu"))
    for turn in SCHEDULE:
        slots, positions = [], []
        for s, n_new in turn.items():
            for position in range(n_context_s[s], n_context_s[s] + n_new):
                if position % page_tokens == 0:
                    table_sp[s, position // page_tokens] = free.pop()
                positions.append(position)
                slots.append(table_sp[s, position // page_tokens] * page_tokens + position % page_tokens)
            n_context_s[s] += n_new
        order = list(turn)
        n_new_s = np.array([turn[s] for s in order], np.int32)
        qkv_thd = torch.randn(len(slots), n_heads + 2 * n_kv_heads, head_dim, device=DEVICE).to(dtype)
        rotation_td = rotation_pd[positions].to(DEVICE)
        layout = BatchLayout(n_new_s, n_context_s[order], table_sp[order], np.array(slots, np.int64))
        expected_thd = qkv_thd.clone()
        slot_t = torch.from_numpy(layout.slot_t).to(DEVICE)
        rope_and_store_ref(expected_thd, rotation_td, slot_t, expected_pages)
        expected_thd = attention_ref(
            expected_thd[:, :n_heads], expected_pages, int32(table_sp[order]), n_new_s.tolist(), layout.n_context_s
        )
        again_thd = qkv_thd.clone()
        found_tX = backend.attend(qkv_thd, 1, StepContext(rotation_td, pages_l, backend.prepare(layout)))
        assert relative_error(found_tX, expected_thd.flatten(1)) < TOLERANCE[dtype]
        assert relative_error(pages_l[1], expected_pages) < TOLERANCE[dtype]
        if turn and max(turn.values()) == 1:  # the same batch as a captured graph sees it
            batch = DecodeBatch(int32(table_sp), int32(order), int32(n_context_s[order]), slot_t)
            step = StepContext(rotation_td, pages_l, backend.prepare_decode(batch))
            assert relative_error(backend.attend(again_thd, 1, step), expected_thd.flatten(1)) < TOLERANCE[dtype]
            assert relative_error(pages_l[1], expected_pages) < TOLERANCE[dtype]
