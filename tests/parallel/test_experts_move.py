"""Experts move between ranks while requests are under way: tokens are those of one rank before, during and after."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import rank_calls
from parallel_engine import ParallelEngine, Request
from rank_processes import RankProcesses, State

from fastdeploy.config.schema import EplbConfig, ParallelConfig
from fastdeploy.distributed.expert_placement import Slots, place
from fastdeploy.wire.experts import ExpertReport

pytestmark = pytest.mark.timeout(300)

GetModel = Callable[..., Path]
N_WANTED = 8
SIZES = [(2, 1), (4, 1), (1, 2), (2, 2)]  # data, tensor


def requests_of(n_data: int) -> list[list[Request]]:
    """Uneven: the first rank has most, each begins at a step of its own."""
    return [
        [
            Request([(7 * i + 31 * j + i * j) % 128 for j in range(1 + (i * 5) % 23)], N_WANTED, arrives_at=i % 7)
            for i in range(10 * d, 10 * d + (4 if d == 0 else 2))
        ]
        for d in range(n_data)
    ]


def report(state: State) -> ExpertReport:
    found: ExpertReport = state["runner"].balancer.report()
    return found


@pytest.mark.parametrize("exchange", ["shm", "gloo"])
@pytest.mark.parametrize(("data", "tensor"), SIZES)
def test_tokens_stay_the_same(
    ranks: RankProcesses, tiny_model: GetModel, data: int, tensor: int, exchange: str
) -> None:
    folder = tiny_model("ernie4_5_moe")
    alone = ParallelEngine(ranks, folder, ParallelConfig())
    expected = [
        [alone.generate([[Request(r.prompt_ids, r.n_wanted)]])[0][0] for r in requests]
        for requests in requests_of(data)
    ]
    parallel = ParallelConfig(data=data, tensor=tensor, expert=True)
    eplb = EplbConfig(redundant=2, min_gain=0.0)
    engine = ParallelEngine(ranks, folder, parallel, exchange, eplb=eplb, rearrange_every=3)
    first = ranks.call(report, [()] * parallel.n_ranks)
    assert engine.generate(requests_of(data)) == expected
    during = ranks.call(report, [()] * parallel.n_ranks)
    assert during[0].n_checks_total >= 3
    assert during[0].n_moved_total > 0 and during[0].slots_lp != first[0].slots_lp
    assert during[0].after <= during[0].before
    for of_rank in during:  # all but the rows are the same everywhere
        assert of_rank.slots_lp == during[0].slots_lp
        assert (of_rank.n_checks_total, of_rank.n_moved_total) == (during[0].n_checks_total, during[0].n_moved_total)
    # Every token of every prompt and output but the last went to two experts of each sparse layer.
    n_tokens = sum(len(r.prompt_ids) + r.n_wanted - 1 for requests in requests_of(data) for r in requests)
    for layer in range(len(during[0].rows_le)):
        assert sum(sum(of_rank.rows_le[layer]) for of_rank in during) == 2 * n_tokens
    engine.rearrange_every = 0
    assert engine.generate(requests_of(data), seed=7) == expected
    assert ranks.call(report, [()] * parallel.n_ranks)[0].n_checks_total == during[0].n_checks_total


def move(state: State, before: Slots, after: Slots, staging_bytes: int) -> list[str]:
    """Move numbers that tell which expert and which byte they are; returns what is wrong afterwards."""
    import torch

    from fastdeploy.distributed.expert_moves import exchange, moves_of

    group = state["group"]
    rank, size = group.where.group_rank, group.where.group_size
    n_slots = len(before) // size
    kinds = [(torch.float32, (3, 5)), (torch.bfloat16, (2, 6)), (torch.uint8, (7,)), (torch.int64, (2, 2))]

    def weights(slots: Slots) -> list[torch.Tensor]:
        mine = slots[rank * n_slots : (rank + 1) * n_slots]
        drawn = [torch.Generator().manual_seed(expert) for expert in mine]
        return [
            torch.stack([torch.randint(0, 100, shape, generator=g).to(dtype) for g in drawn]) for dtype, shape in kinds
        ]

    stacks = weights(before)
    exchange(stacks, moves_of(before, after, size, rank), group, staging_bytes)
    pairs = zip(stacks, weights(after), kinds, strict=True)
    return [f"rank {rank}: {kind}" for found, expected, kind in pairs if not torch.equal(found, expected)]


@pytest.mark.parametrize("staging_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_placement_follows_any_other(ranks: RankProcesses, size: int, staging_bytes: int) -> None:
    """Also cycles over all ranks, an expert that goes to many, and with less room than one weight takes."""
    rank_calls.make_group(ranks, ParallelConfig(data=size, expert=True))
    n_experts, n_slots = 5, 4
    placements = [place([(7 * e * seed) % 11 for e in range(n_experts)], size, n_slots) for seed in (1, 2, 3)]
    runs = tuple(range(n_experts)) + (0,) * (size * n_slots - n_experts)
    placements += [runs, runs[n_slots:] + runs[:n_slots], tuple(reversed(runs)), placements[0]]
    for before, after in pairwise(placements):
        assert ranks.call(move, [(before, after, staging_bytes)] * size) == [[]] * size
