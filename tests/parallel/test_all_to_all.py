"""Every exchange gives each rank all rows, and each row the sum of what all experts made of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import rank_calls
from rank_processes import RankProcesses, State

from fastdeploy.config.schema import ParallelConfig

pytestmark = pytest.mark.timeout(300)

HIDDEN, N_EXPERTS, K = 24, 11, 3
SIZES = (2, 4, 8)
BACKENDS = ("shm", "gloo")


def exchange(state: State, name: str, dtype_name: str, rows_of_cases: Sequence[tuple[int, ...]]) -> list[str]:
    """Exchange rows for each case (rows of each rank) with experts that scale; returns what was wrong."""
    import torch

    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all
    from fastdeploy.distributed.topology import run_of
    from fastdeploy.layers.moe.gate import Routing

    group, dtype = state["group"], getattr(torch, dtype_name)
    rank, size = group.where.group_rank, group.where.group_size
    all_to_all = make_all_to_all(name, group, ExpertRows(N_EXPERTS, K, HIDDEN, dtype))
    poison(all_to_all)
    first, n_local = run_of(N_EXPERTS, size, rank)
    wrong = []
    for case, n_rows_g in enumerate(rows_of_cases):
        rows_g = [rows_of(n, 1000 * case + g, dtype) for g, n in enumerate(n_rows_g)]
        x_tH, expert_tk, weight_tk = rows_g[rank]
        sent = all_to_all.dispatch(x_tH, Routing(expert_tk, weight_tk), n_rows_g)
        if not torch.equal(sent.x_rH, torch.cat([x for x, _, _ in rows_g])):
            wrong.append(f"case {case} {n_rows_g}: rows differ")
        expert_rk = torch.cat([expert for _, expert, _ in rows_g])
        here_rk = (expert_rk >= first) & (expert_rk < first + n_local)
        if not torch.equal(sent.routing.expert_tk, torch.where(here_rk, expert_rk - first, n_local)):
            wrong.append(f"case {case} {n_rows_g}: local experts differ")
        scale_e = torch.cat([torch.arange(first, first + n_local) + 1.0, torch.zeros(1)])  # 0 for experts elsewhere
        weight_r1 = (scale_e[sent.routing.expert_tk] * sent.routing.weight_tk).sum(1, keepdim=True)
        y_tH = all_to_all.combine((sent.x_rH * weight_r1).to(dtype), sent)
        expected_tH = x_tH * ((expert_tk + 1) * weight_tk).sum(1, keepdim=True)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
        if not torch.allclose(y_tH, expected_tH.to(dtype), **tolerance) or y_tH.shape != x_tH.shape:
            wrong.append(f"case {case} {n_rows_g}: sums differ")
    return wrong


def rows_of(n: int, seed: int, dtype):  # type: ignore[no-untyped-def]
    """Rows, experts and weights that every rank can make again."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x_tH = torch.randn(n, HIDDEN, generator=generator).to(dtype)
    scores_te = torch.rand(n, N_EXPERTS, generator=generator)
    return x_tH, scores_te.topk(K).indices, torch.rand(n, K, generator=generator).to(dtype)


def poison(all_to_all) -> None:  # type: ignore[no-untyped-def]
    """What nobody wrote must not be read: shared buffers start as NaN."""
    region = getattr(all_to_all, "_region", None)
    if region is not None:
        if region.rank == 0:
            for buffer in region._buffers:
                buffer.fill_(0xFF)
        region.meet()
        region.meet()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_ranks", SIZES)
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_and_sums(ranks: RankProcesses, name: str, n_ranks: int, dtype: str) -> None:
    rank_calls.make_group(ranks, ParallelConfig(data=n_ranks, expert=True))
    draw = random.Random(n_ranks)
    cases = [tuple(draw.choice((0, 0, 1, 2, 7, 33)) for _ in range(n_ranks)) for _ in range(25)]
    cases = [case for case in cases if any(case)] + [(1,) * n_ranks, (0,) * (n_ranks - 1) + (5,)]
    assert ranks.call(exchange, [(name, dtype, cases)] * n_ranks) == [[]] * n_ranks


def same_bits(state: State, n_rows: int) -> list[bytes]:
    """What each backend's combine gives for rows whose sums depend on the order of their terms."""
    import torch

    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all
    from fastdeploy.layers.moe.gate import Routing

    group, found = state["group"], []
    size, rank = group.where.group_size, group.where.group_rank
    for name in BACKENDS:
        all_to_all = make_all_to_all(name, group, ExpertRows(N_EXPERTS, K, HIDDEN, torch.float32))
        x_tH, expert_tk, weight_tk = rows_of(n_rows, 5, torch.float32)
        sent = all_to_all.dispatch(x_tH, Routing(expert_tk, weight_tk), (n_rows,) * size)
        y_rH = sent.x_rH * torch.rand(1, HIDDEN, generator=torch.Generator().manual_seed(rank))
        found.append(all_to_all.combine(y_rH, sent).numpy().tobytes())
    return found


def test_backends_and_ranks_add_in_one_order(ranks: RankProcesses) -> None:
    rank_calls.make_group(ranks, ParallelConfig(data=4, expert=True))
    found = ranks.call(same_bits, [(9,)] * 4)
    assert len({bits for of_rank in found for bits in of_rank}) == 1


def collect(state: State, lengths: Sequence[int], n_columns: int) -> list[bytes]:
    """Sums and gathers of the tensor ranks, by shared memory and by gloo."""
    import torch

    from fastdeploy.distributed.collectives import GroupCollectives, Peers, make_collectives
    from fastdeploy.distributed.topology import run_of

    group, found = state["group"], []
    where = group.where
    ways = [make_collectives(group), GroupCollectives(group.tensor, group.name)]
    for way in ways:
        peers = Peers(where)
        peers.connect(way, None)
        for n in lengths:
            whole_gnN = torch.randn(where.n_tensor, n, n_columns, generator=torch.Generator().manual_seed(n))
            total = peers.all_reduce_sum(whole_gnN[where.tensor_rank].clone())
            assert torch.allclose(total, whole_gnN.sum(0), atol=1e-5)
            first, n_mine = run_of(n_columns, where.n_tensor, where.tensor_rank)
            gathered = peers.gather_columns(whole_gnN[0][:, first : first + n_mine], n_columns)
            assert torch.equal(gathered, whole_gnN[0])
            found.append(total.numpy().tobytes())
    assert found[: len(lengths)] == found[len(lengths) :]
    return found


@pytest.mark.parametrize("n_ranks", SIZES)
def test_collectives(ranks: RankProcesses, n_ranks: int) -> None:
    """Sizes from nothing to more than a shared buffer holds; columns that cannot be shared equally."""
    rank_calls.make_group(ranks, ParallelConfig(tensor=n_ranks))
    n_large = (16 << 20) // (4 * 1001 * n_ranks) + 100
    found = ranks.call(collect, [((0, 1, 5, n_large), 1001)] * n_ranks)
    assert all(of_rank == found[0] for of_rank in found)


def shrink(state: State, case: tuple[int, ...]) -> list[int]:
    """A sparse layer on rows that fit into no single exchange; returns the shape of its output."""
    import torch

    from fastdeploy.config.schema import MoEShape
    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all
    from fastdeploy.distributed.collectives import Peers
    from fastdeploy.layers.moe.layer import SparseMoE
    from fastdeploy.layers.placement import Placement
    from fastdeploy.models.random_weights import RandomWeights
    from fastdeploy.runner.step import StepContext
    from fastdeploy.wire.messages import StepAgreement

    group = state["group"]
    moe = MoEShape(
        n_experts=N_EXPERTS,
        n_experts_per_token=K,
        expert_width=16,
        shared_width=0,
        layers=(0,),
        has_correction_bias=False,
        renormalise=True,
        norm_min=1e-12,
        gate_in_float32=True,
    )
    x_tH = torch.randn(case[group.where.data_rank], HIDDEN) * 100
    outputs = []
    all_to_all = make_all_to_all("shm", group, ExpertRows(N_EXPERTS, K, HIDDEN, torch.float32))
    for peers, max_rows in ((Peers(group.where), 7), (Peers(group.where), None), (Peers(), None)):
        all_to_all.max_rows = max_rows
        peers.connect(None, all_to_all)
        layer = SparseMoE(HIDDEN, moe, Placement(torch.float32, torch.device("cpu"), peers))
        layer.load(RandomWeights(1, 0), "layer")
        step = StepContext(torch.empty(0), [], None, StepAgreement(list(case), max(case), False))
        outputs.append(layer(x_tH, step))
    assert torch.allclose(outputs[0], outputs[2], rtol=1e-3, atol=1e-5), "cut into pieces"
    assert torch.allclose(outputs[1], outputs[2], rtol=1e-3, atol=1e-5), "whole"
    return list(outputs[0].shape)


def test_more_rows_than_fit_into_one_exchange(ranks: RankProcesses) -> None:
    rank_calls.make_group(ranks, ParallelConfig(data=4, expert=True))
    case = (17, 0, 3, 30)
    assert ranks.call(shrink, [(case,)] * 4) == [[n, HIDDEN] for n in case]
