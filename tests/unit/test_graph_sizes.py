"""Sizes of captured decode steps."""

from __future__ import annotations

import pytest

from fastdeploy.runner.graph_sizes import first_sizes, graph_sizes

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("max_seqs", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 4)), (8, (1, 2, 4, 8)), (10, (1, 2, 4, 8, 16)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_sizes_end_with_the_first_that_holds_all_slots(max_seqs: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(max_seqs) == sizes


@pytest.mark.parametrize("max_seqs", [1, 5, 64, 200, 256, 4096])
def test_every_batch_fits_one_of_the_first_sizes(max_seqs: int) -> None:
    sizes = graph_sizes(max_seqs)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] <= 512
    assert set(first_sizes(sizes)) <= set(sizes)
    assert first_sizes(sizes)[0] == sizes[-1] >= min(max_seqs, 512)
