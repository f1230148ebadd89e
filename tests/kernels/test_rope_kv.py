"""The small kernels of a step (rotation and storing, gathering of inputs, argmax) against their references."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, DTYPES, TOLERANCE, needs_triton, relative_error

from fastdeploy.config.schema import RopeShape
from fastdeploy.layers.rotary import rotations

pytestmark = [pytest.mark.timeout(300), needs_triton]

SHAPES = [(20, 4, 128, 64), (4, 4, 64, 16), (9, 3, 64, 17), (1, 1, 128, 4096)]  # heads, kv heads, size, page


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [0, 1, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotates_in_place_and_stores_at_the_slots(
    shape: tuple[int, int, int, int], n_tokens: int, dtype: torch.dtype
) -> None:
    from fastdeploy.kernels.rope_kv import rope_and_store, rope_and_store_ref

    n_heads, n_kv_heads, head_dim, page_tokens = shape
    n_pages = 5
    qkv_thd = torch.randn(n_tokens, n_heads + 2 * n_kv_heads, head_dim, device=DEVICE).to(dtype)
    position_t = torch.randint(0, 50, (n_tokens,))
    rope = RopeShape(theta=1e4, style="interleaved")
    rotation_td = rotations(rope, head_dim, 50, torch.device("cpu"))[position_t].to(DEVICE)
    slot_t = torch.randperm(n_pages * page_tokens)[:n_tokens].to(DEVICE)
    slot_t[1::3] = -1
    pages = torch.full((n_pages, 2, n_kv_heads, page_tokens, head_dim), float("nan"), device=DEVICE, dtype=dtype)
    expected_thd, expected_pages = qkv_thd.clone(), pages.clone()
    rope_and_store_ref(expected_thd, rotation_td, slot_t, expected_pages)
    rope_and_store(qkv_thd, rotation_td, slot_t, pages)
    assert relative_error(qkv_thd, expected_thd) < TOLERANCE[dtype]
    assert torch.equal(pages.isnan(), expected_pages.isnan())  # nothing else was written
    assert relative_error(pages.nan_to_num(), expected_pages.nan_to_num()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "vocab_size"), [(0, 10), (1, 1), (1, 103424), (5, 4097), (3, 8192)])
def test_argmax_takes_the_first_of_the_largest(n_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.argmax import Argmax, argmax_ref

    find = Argmax(8, vocab_size, DEVICE)
    for _ in range(3):  # the counters must be back at zero after each call
        logits_sV = torch.randint(-9, 9, (n_rows, vocab_size), device=DEVICE).to(dtype)  # many ties
        assert torch.equal(find(logits_sV), argmax_ref(logits_sV))
    into, at_s = torch.full((9,), -1, device=DEVICE), torch.arange(8, 8 - n_rows, -1, device=DEVICE, dtype=torch.int32)
    found_s = find(logits_sV, into, at_s)
    assert into.tolist() == [-1] * (9 - n_rows) + found_s.flip(0).tolist()
    lowest_sV = torch.full((n_rows, vocab_size), -torch.inf, device=DEVICE, dtype=dtype)
    assert torch.equal(find(lowest_sV), argmax_ref(lowest_sV))


@pytest.mark.parametrize("n_rows", [0, 1, 6])
def test_begin_decode_takes_pages_in_and_gathers_what_the_rows_start_from(n_rows: int) -> None:
    from fastdeploy.kernels.begin_decode import begin_decode, begin_decode_ref

    slot_s = torch.randperm(8)[:n_rows]
    position_s = torch.randint(0, 50, (n_rows,))
    column_s = torch.randint(-1, 3, (n_rows,))
    rows_5s = torch.stack([slot_s, position_s, column_s, torch.arange(100, 100 + n_rows), slot_s]).int().to(DEVICE)
    newest_s = torch.randint(0, 1000, (9,), device=DEVICE)
    rotation_pd = torch.randn(50, 32, dtype=torch.complex64).to(DEVICE)
    table_sp = torch.randint(0, 99, (9, 3), dtype=torch.int32, device=DEVICE)
    expected_table_sp = table_sp.clone()
    rows_5s[2, 1::2] = -1
    found = begin_decode(rows_5s[0], rows_5s[1], rows_5s[2], rows_5s[3], newest_s, rotation_pd, table_sp)
    expected = begin_decode_ref(
        rows_5s[0], rows_5s[1], rows_5s[2], rows_5s[3], newest_s, rotation_pd, expected_table_sp
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(table_sp, expected_table_sp)
