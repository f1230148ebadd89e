"""Copies of KV pages and their check values: the reference by its definition, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, needs_triton

from fastdeploy.kernels.cpu.library import KernelsUnavailableError, load_kernels, supported_isas
from fastdeploy.kernels.page_copy_ref import copy_pages_ref

pytestmark = pytest.mark.timeout(300)

# heads copied, heads of a source page, of a target page, words
SHAPES = [(1, 1, 1, 1), (4, 4, 4, 2048), (2, 3, 2, 16), (1, 2, 5, 700), (3, 4, 4, 33)]
N_PAGES = [0, 1, 13]


def words(*shape: int, device: torch.device | None = None) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, device=device)


def check_by_definition(head_words: list[int]) -> int:
    """As the text of the reference says it, with Python's own numbers."""
    total = 0
    for i, word in enumerate(head_words):
        x = word % 2**64
        y = x ^ ((i + 1) * 0x9E3779B97F4A7C15 % 2**64)
        total += (y % 2**32) * (y >> 32) + ((x << 32) % 2**64 | x >> 32)
    return total % 2**64


def test_the_reference_is_what_its_text_says() -> None:
    pages = words(5, 2, 3, 7)
    checks = copy_pages_ref(pages, torch.tensor([4, 0]), None, None)
    for n, page in enumerate((4, 0)):
        for head in range(3):
            assert int(checks[n, head]) % 2**64 == check_by_definition(pages[page, :, head].flatten().tolist())


def test_every_changed_bit_and_exchanged_words_change_the_check() -> None:
    pages = words(1, 2, 1, 4)
    (expected,) = copy_pages_ref(pages, torch.tensor([0]), None, None).flatten().tolist()
    seen = {expected}
    for word in range(8):
        for bit in range(64):
            other = pages.clone()
            other.view(-1)[word] ^= (1 << bit) if bit < 63 else -(2**63)
            seen.add(int(copy_pages_ref(other, torch.tensor([0]), None, None)))
    assert len(seen) == 1 + 8 * 64
    seen.add(int(copy_pages_ref(pages.flip(3), torch.tensor([0]), None, None)))
    seen.add(int(copy_pages_ref(pages.flip(1), torch.tensor([0]), None, None)))
    assert len(seen) == 3 + 8 * 64


def compare(copy, shape: tuple[int, int, int, int], n_pages: int, device: torch.device) -> None:
    """Pages in any order, some heads of them; nothing else is written."""
    n_heads, n_source_heads, n_target_heads, n_words = shape
    source = words(20, 2, n_source_heads, n_words, device=device)[:, :, n_source_heads - n_heads :]
    found, expected = (words(30, 2, n_target_heads, n_words, device=device) for _ in range(2))
    expected.copy_(found)
    from_ids = torch.randperm(20, device=device)[:n_pages]
    to_ids = torch.randperm(30, device=device)[:n_pages]
    expected_checks = copy_pages_ref(source, from_ids, expected[:, :, :n_heads], to_ids)
    assert torch.equal(copy(source, from_ids, None, None), expected_checks)
    assert torch.equal(copy(source, from_ids, found[:, :, :n_heads], to_ids), expected_checks)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n_pages", N_PAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", supported_isas())
def test_c(isa: str, shape: tuple[int, int, int, int], n_pages: int) -> None:
    from fastdeploy.kernels.cpu.pages import copy_pages

    try:
        kernels = load_kernels(isa)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    compare(lambda *args: copy_pages(kernels, *args), shape, n_pages, torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize("n_pages", N_PAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton(shape: tuple[int, int, int, int], n_pages: int) -> None:
    from fastdeploy.kernels.page_copy import copy_pages

    compare(copy_pages, shape, n_pages, DEVICE)
