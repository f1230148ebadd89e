"""The order of candidates, their truncation, and the draw among them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.runner.ranking import best_keys, first_depth, kept_tokens, key_token_ids, order_keys
from fastdeploy.runner.sampler import draw, first_above

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")


# ---- order and truncation ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_keys_order_by_logit_then_token(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    keys = order_keys(torch.tensor([values], dtype=torch.float32))
    expected = sorted(range(len(values)), key=lambda token: (-values[token], token))
    assert key_token_ids(best_keys(keys, k))[0].tolist() == expected[:k]


@pytest.mark.parametrize("vocab_size", [600, 5000])
def test_truncation_does_not_depend_on_how_deep_it_looks_first(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # bfloat16 makes ties; the flat rows have a nucleus far beyond the first candidates.
    x = (
        torch.randn(8, vocab_size, generator=generator) * torch.tensor([0.01, 0.1, 1, 1, 2, 4, 8, 0.0])[:, None]
    ).bfloat16()
    x = x.float()
    weights = torch.softmax(x, -1)
    top_k = torch.tensor([vocab_size, vocab_size, vocab_size, 50, vocab_size, 3, vocab_size, vocab_size])
    top_p = torch.tensor([0.9, 0.99, 0.5, 1.0, 0.95, 0.7, 0.8, 0.6], dtype=torch.float64)

    def kept(n_first: int) -> list[list[int]]:
        mask = kept_tokens(x, weights, top_k, top_p, n_first, decided=False)
        return [row.nonzero().squeeze(1).tolist() for row in mask]

    deep = kept(vocab_size)
    assert kept(50) == deep and kept(64) == deep
    assert len(deep[3]) == 50
    assert deep[7] == list(range(len(deep[7])))  # all equal: the lowest ids
    for row in range(8):
        order = sorted(range(vocab_size), key=lambda token: (-x[row, token].item(), token))[: top_k[row]]
        sums = weights[row, order].double().cumsum(0)
        n_kept = int((sums < top_p[row] * sums[-1]).sum()) + 1
        assert sorted(deep[row]) == sorted(order[:n_kept])


def test_a_wide_nucleus_is_cut_inside_its_bucket() -> None:
    """Clusters of nearly equal logits: the cut lies among thousands of tokens of one bucket, or among a few."""
    for n_cluster in (200, 3000):
        base = torch.arange(6000, 0, -1).clamp(max=6000 - n_cluster) * 1e-3
        x = (base + torch.arange(6000) % 7 * 1e-5)[None].float()
        weights = torch.softmax(x, -1)
        for p in (0.3, 0.6, 0.9, 1 - 1e-12):
            top_k, top_p = torch.tensor([6000]), torch.tensor([p], dtype=torch.float64)
            shallow = kept_tokens(x, weights, top_k, top_p, 16, decided=False)
            assert torch.equal(shallow, kept_tokens(x, weights, top_k, top_p, 6000, decided=False))
            assert weights[shallow].double().sum() >= p * weights.double().sum()


def test_first_depth_covers_top_k_and_never_exceeds_the_vocabulary() -> None:
    assert first_depth(0, 100_000, CPU) == 128
    assert first_depth(5000, 100_000, CPU) == 5000
    assert first_depth(90_000, 100_000, CPU) == 100_000
    assert first_depth(0, 3, CPU) == 3


# ---- the draw ----


@pytest.mark.parametrize("n_places", [1, 2, 1023, 1024, 1025, 5000])
def test_draw_inverts_the_cumulative_distribution(n_places: int) -> None:
    rng = np.random.default_rng(n_places)
    weights = rng.random((40, n_places), dtype=np.float32) * (rng.random((40, n_places)) < 0.3)
    weights[np.arange(40), rng.integers(n_places, size=40)] = 1.0
    uniforms = rng.random(40)
    found = draw(torch.from_numpy(weights), torch.from_numpy(uniforms)).tolist()
    for row in range(40):
        sums = np.cumsum(weights[row].astype(np.float64))
        assert found[row] == int(np.searchsorted(sums, uniforms[row] * sums[-1], side="right"))


def test_draw_never_finds_a_place_without_weight() -> None:
    weights = torch.zeros(4, 3000)
    weights[:2, 1500], weights[2:, 7], weights[2:, 2500] = 1e-30, 0.1, 0.7
    ends = torch.tensor([0.0, 1 - 2**-53, 0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, ends).tolist() == [1500, 1500, 7, 2500]
    assert draw(torch.zeros(1, 3000), ends[:1]).tolist() == [0]
    assert draw(torch.full((1, 3000), math.nan), ends[:1]).tolist() == [0]


def test_rounded_sums_never_lead_to_a_place_without_weight() -> None:
    """A parallel scan need not grow steadily, and the target can round up to the total."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]])
    sums = torch.tensor([[1e-16, 1.0, 1.0 + 1e-15, 2.0, 2.0]], dtype=torch.float64)
    for target, place in [(0.0, 1), (1.0, 3), (2.0, 3), (-1e-16, 1)]:
        assert first_above(sums, weights, torch.tensor([[target]], dtype=torch.float64)).tolist() == [[place]]


def test_draw_is_exact_in_a_large_flat_vocabulary() -> None:
    """Sums in float32 would be wrong from the fourth digit on."""
    n_places = 100_000
    weights = torch.full((5, n_places), 1e-5)
    places = torch.tensor([0, 1, 50_000, 77_777, n_places - 1])
    assert draw(weights, (places.double() + 0.5) / n_places).tolist() == places.tolist()
