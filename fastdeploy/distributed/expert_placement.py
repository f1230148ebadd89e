"""Which expert lies in which slot of which rank, from how many rows went to each: pure functions of numbers.

Every rank of an expert-parallel group has the same number of slots. A slot holds one expert; an expert that gets many
rows may lie in several slots, all of different ranks, which share its rows evenly. All ranks compute the placement by
themselves from the same counts, so the results must be the same everywhere: no hashes, no randomness, ties by number.
"""

from __future__ import annotations

from collections.abc import Sequence

STAGING_BYTES = 64 << 20  # what a rank takes beside its weights while some move

# Of one layer: the expert in each slot, those of a rank side by side, in the order of the ranks.
Slots = tuple[int, ...]


def slots_per_rank(n_experts: int, n_redundant: int, n_ranks: int) -> int:
    """Slots for all experts and at least `n_redundant` copies."""
    return -(-(n_experts + n_redundant) // n_ranks)


def most_redundant(n_experts: int, n_ranks: int) -> int:
    """Above so many copies a rank would hold an expert twice."""
    return n_experts * (n_ranks - 1)


def place(rows_e: Sequence[int], n_ranks: int, n_slots: int, before: Slots | None = None) -> Slots:
    """`n_slots` slots of each rank for experts that got `rows_e` rows: hot experts in several, ranks as even as may be.

    Every expert has a slot and no rank holds one twice, which takes len(rows_e) <= n_ranks * n_slots and n_slots <=
    len(rows_e). With `before`, what may stay where it is does.
    """
    assert n_slots <= len(rows_e) <= n_ranks * n_slots, "no slots for these experts"
    held = _spread(rows_e, _copies(rows_e, n_ranks, n_slots), n_ranks, n_slots)
    if before is None:
        return tuple(expert for experts in held for expert in sorted(experts))
    old = [before[rank * n_slots : (rank + 1) * n_slots] for rank in range(n_ranks)]
    return tuple(e for rank, mine in enumerate(_least_moved(held, old)) for e in _stay(mine, old[rank]))


def rows_of_ranks(rows_e: Sequence[int], slots: Slots, n_ranks: int) -> list[float]:
    """Rows that each rank computes when the slots of an expert share its rows evenly."""
    n_slots, n_copies = len(slots) // n_ranks, [0] * len(rows_e)
    for expert in slots:
        n_copies[expert] += 1
    of_slot = [rows_e[expert] / n_copies[expert] for expert in slots]
    return [sum(of_slot[rank * n_slots : (rank + 1) * n_slots]) for rank in range(n_ranks)]


def busiest_over_mean(rows_le: Sequence[Sequence[int]], slots_l: Sequence[Slots], n_ranks: int) -> float:
    """How much longer the ranks wait for the busiest of them, in every layer, than if all had the same; 1 is even."""
    busiest = mean = 0.0
    for rows_e, slots in zip(rows_le, slots_l, strict=True):
        rows_g = rows_of_ranks(rows_e, slots, n_ranks)
        busiest, mean = busiest + max(rows_g), mean + sum(rows_g) / n_ranks
    return busiest / mean if mean else 1.0


def rebalance(rows_le: Sequence[Sequence[int]], slots_l: Sequence[Slots], n_ranks: int, min_gain: float) -> list[Slots]:
    """For each layer a placement: a new one where it takes at least `min_gain` times the mean off the busiest rank."""
    chosen = []
    for rows_e, before in zip(rows_le, slots_l, strict=True):
        mean, busiest = sum(rows_e) / n_ranks, max(rows_of_ranks(rows_e, before, n_ranks))
        if busiest - mean <= min_gain * mean:  # the mean is the best there may be: no placement needs to be worked out
            chosen.append(before)
            continue
        after = place(rows_e, n_ranks, len(before) // n_ranks, before)
        gain = busiest - max(rows_of_ranks(rows_e, after, n_ranks))
        chosen.append(after if gain > 0 and gain >= min_gain * mean else before)
    return chosen


def _copies(rows_e: Sequence[int], n_ranks: int, n_slots: int) -> list[int]:
    """How many slots each expert gets: one more for the one whose copies have most rows each, until all are taken."""
    n_copies = [1] * len(rows_e)
    for _ in range(n_ranks * n_slots - len(rows_e)):
        may = (e for e, n in enumerate(n_copies) if n < n_ranks)
        n_copies[max(may, key=lambda e: (rows_e[e] / n_copies[e], -n_copies[e], -e))] += 1
    return n_copies


def _spread(rows_e: Sequence[int], n_copies: Sequence[int], n_ranks: int, n_slots: int) -> list[set[int]]:
    """The experts of each rank: the largest first, each on the rank that has least to do and room for it."""
    held: list[set[int]] = [set() for _ in range(n_ranks)]
    load_g = [0.0] * n_ranks
    share_e = [rows / n for rows, n in zip(rows_e, n_copies, strict=True)]
    for expert in sorted(range(len(rows_e)), key=lambda e: (-share_e[e], e)):
        for _ in range(n_copies[expert]):
            free = [g for g in range(n_ranks) if len(held[g]) < n_slots]
            rank = min((g for g in free if expert not in held[g]), key=lambda g: (load_g[g], g), default=-1)
            if rank < 0:  # all with room hold it: one that does not, and is full, gives something to one with room
                rank = min((g for g in range(n_ranks) if expert not in held[g]), key=lambda g: (load_g[g], g))
                to = min(free, key=lambda g: (load_g[g], g))
                given = min(held[rank] - held[to], key=lambda e: (share_e[e], e))
                held[rank].remove(given)
                held[to].add(given)
                load_g[rank] -= share_e[given]
                load_g[to] += share_e[given]
            held[rank].add(expert)
            load_g[rank] += share_e[expert]
    return held


def _least_moved(held: list[set[int]], old: Sequence[Sequence[int]]) -> list[set[int]]:
    """The same sets, given to the ranks that hold most of them already."""
    pairs = sorted(
        ((i, g) for i in range(len(held)) for g in range(len(old))),
        key=lambda pair: (-len(held[pair[0]].intersection(old[pair[1]])), pair),
    )
    rank_of: dict[int, int] = {}
    for i, g in pairs:
        if i not in rank_of and g not in rank_of.values():
            rank_of[i] = g
    return [held[i] for i in sorted(rank_of, key=rank_of.__getitem__)]


def _stay(experts: set[int], before: Sequence[int]) -> list[int]:
    """The experts of one rank, those that it held in their slots, the others in what is left, in order."""
    new = iter(sorted(experts.difference(before)))
    return [expert if expert in experts else next(new) for expert in before]
