"""Placement of experts: whole, without doubles on a rank, even, equal for equal counts, and still where it can be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.distributed import expert_placement as ep

pytestmark = pytest.mark.timeout(60)
search = settings(max_examples=200, derandomize=True, deadline=None, database=None)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(rows of each expert, ranks, slots of a rank)."""
    n_ranks = draw(st.integers(1, 9))
    n_experts = draw(st.integers(n_ranks, 40))
    n_redundant = draw(st.integers(0, ep.most_redundant(n_experts, n_ranks)))
    rows = draw(st.lists(st.integers(0, 10**9) | st.integers(0, 3), min_size=n_experts, max_size=n_experts))
    return rows, n_ranks, ep.slots_per_rank(n_experts, n_redundant, n_ranks)


def check(slots: ep.Slots, n_experts: int, n_ranks: int, n_slots: int) -> None:
    assert len(slots) == n_ranks * n_slots
    assert set(slots) == set(range(n_experts))
    for rank in range(n_ranks):
        mine = slots[rank * n_slots : (rank + 1) * n_slots]
        assert len(set(mine)) == n_slots


@search
@given(groups())
def test_every_expert_has_a_slot_and_no_rank_holds_one_twice(group: tuple[list[int], int, int]) -> None:
    rows, n_ranks, n_slots = group
    slots = ep.place(rows, n_ranks, n_slots)
    check(slots, len(rows), n_ranks, n_slots)
    assert sum(ep.rows_of_ranks(rows, slots, n_ranks)) == pytest.approx(sum(rows))
    assert slots == ep.place(tuple(rows), n_ranks, n_slots)


@search
@given(groups(), st.randoms(use_true_random=False))
def test_what_is_there_already_stays(group: tuple[list[int], int, int], draw: random.Random) -> None:
    """With a placement before: as even as without, and one that comes again moves nothing."""
    rows, n_ranks, n_slots = group
    before = ep.place([draw.randrange(1000) for _ in rows], n_ranks, n_slots)
    after = ep.place(rows, n_ranks, n_slots, before)
    check(after, len(rows), n_ranks, n_slots)
    anew = ep.place(rows, n_ranks, n_slots)
    assert sorted(ep.rows_of_ranks(rows, after, n_ranks)) == pytest.approx(
        sorted(ep.rows_of_ranks(rows, anew, n_ranks))
    )
    for rank in range(n_ranks):
        old, new = (slots[rank * n_slots : (rank + 1) * n_slots] for slots in (before, after))
        assert all(expert not in new or new[slot] == expert for slot, expert in enumerate(old))
    assert ep.place(rows, n_ranks, n_slots, after) == after


@search
@given(groups())
def test_hot_experts_are_copied(group: tuple[list[int], int, int]) -> None:
    """No expert has a copy more while each copy of another has more rows, unless that one is everywhere."""
    rows, n_ranks, n_slots = group
    slots = ep.place(rows, n_ranks, n_slots)
    n_copies = [slots.count(expert) for expert in range(len(rows))]
    for expert, n in enumerate(n_copies):
        if n > 1:
            assert all(
                rows[expert] / (n - 1) >= rows[other] / n_copies[other]
                for other in range(len(rows))
                if n_copies[other] < n_ranks
            )


@search
@given(groups(), st.floats(0, 1), st.randoms(use_true_random=False))
def test_rebalancing_never_makes_it_worse(
    group: tuple[list[int], int, int], min_gain: float, draw: random.Random
) -> None:
    rows, n_ranks, n_slots = group
    before = [ep.place([draw.randrange(1000) for _ in rows], n_ranks, n_slots) for _ in range(2)]
    rows_le = [rows, [0] * len(rows)]
    after = ep.rebalance(rows_le, before, n_ranks, min_gain)
    assert after[1] == before[1]  # nobody asked for its experts
    gain = max(ep.rows_of_ranks(rows, before[0], n_ranks)) - max(ep.rows_of_ranks(rows, after[0], n_ranks))
    assert after[0] == before[0] or (gain > 0 and gain >= min_gain * sum(rows) / n_ranks)
    assert ep.busiest_over_mean(rows_le, after, n_ranks) <= ep.busiest_over_mean(rows_le, before, n_ranks)


@pytest.mark.parametrize(("n_experts", "n_ranks"), [(64, 2), (64, 8), (128, 16), (256, 32)])
def test_zipf(n_experts: int, n_ranks: int) -> None:
    """One copy more on each rank evens out what a fixed run of experts does not."""
    rows = [int(1e9 / (i + 1)) for i in range(n_experts)]
    runs = tuple(range(n_experts))
    n_slots = ep.slots_per_rank(n_experts, n_ranks, n_ranks)
    assert ep.busiest_over_mean([rows], [runs], n_ranks) > 1.5
    assert ep.busiest_over_mean([rows], [ep.place(rows, n_ranks, n_slots)], n_ranks) < 1.05


def test_no_rows_are_even() -> None:
    assert ep.busiest_over_mean([[0, 0]], [(0, 1)], 2) == 1.0
    assert ep.busiest_over_mean([[3, 1]], [(0, 1)], 2) == 1.5
    assert ep.busiest_over_mean([[3, 1]], [(0, 1, 0, 1)], 2) == 1.0
