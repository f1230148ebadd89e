"""The exchange and the collectives of GPUs, also inside a CUDA graph; one process a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rank_calls
import torch
from rank_processes import RankProcesses, State

from fastdeploy.config.schema import ParallelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

HIDDEN, N_EXPERTS, K = 64, 12, 3


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankProcesses]:
    """Processes of their own: their groups stay until they end."""
    processes = RankProcesses()
    yield processes
    processes.stop()


def join_on_gpu(state: State, parallel: ParallelConfig, number: int, meeting: rank_calls.Meeting) -> None:
    """As `rank_calls.join`, on this rank's GPU."""
    from fastdeploy.distributed import groups

    torch.cuda.set_device(number)
    device = torch.device("cuda", number)
    state["group"] = groups.join(parallel, number, device, *meeting, state.get("store"), patience_s=60)


def make_group_on_gpus(gpus: RankProcesses, parallel: ParallelConfig) -> None:
    """Every process has a group in its state afterwards."""
    meetings = rank_calls.meet(gpus, parallel)
    gpus.call(join_on_gpu, [(parallel, number, meeting) for number, meeting in enumerate(meetings)])


def rows_on_gpu(n: int, seed: int):  # type: ignore[no-untyped-def]
    """Rows, experts and weights that every rank can make again."""
    generator = torch.Generator().manual_seed(seed)
    x_tH = torch.randn(n, HIDDEN, generator=generator).bfloat16().cuda()
    expert_tk = torch.rand(n, N_EXPERTS, generator=generator).topk(K).indices.cuda()
    return x_tH, expert_tk, torch.rand(n, K, generator=generator).cuda()


def exchange_on_gpu(state: State, name: str, rows_of_cases: list[tuple[int, ...]], in_graph: bool) -> list[str]:
    """What was wrong with the sums of experts that scale."""
    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all
    from fastdeploy.distributed.topology import run_of
    from fastdeploy.layers.moe.gate import Routing

    group = state["group"]
    rank, size = group.where.group_rank, group.where.group_size
    all_to_all = make_all_to_all(name, group, ExpertRows(N_EXPERTS, K, HIDDEN, torch.bfloat16))
    first, n_local = run_of(N_EXPERTS, size, rank)
    scale_e = torch.cat([torch.arange(first, first + n_local) + 1.0, torch.zeros(1)]).cuda()

    def layer(x_tH, expert_tk, weight_tk, n_rows_g):  # type: ignore[no-untyped-def]
        sent = all_to_all.dispatch(x_tH, Routing(expert_tk, weight_tk), n_rows_g)
        wanted_r1 = (sent.routing.expert_tk < n_local).any(1, keepdim=True)
        weight_r1 = (scale_e[sent.routing.expert_tk.long()] * sent.routing.weight_tk).sum(1, keepdim=True)
        return all_to_all.combine(torch.where(wanted_r1, sent.x_rH * weight_r1, 0).bfloat16(), sent)

    wrong = []
    for case, n_rows_g in enumerate(rows_of_cases):
        given = rows_on_gpu(n_rows_g[rank], 100 * case + rank)
        if in_graph:
            static = [torch.zeros_like(part) for part in given]
            layer(*static, n_rows_g)  # NCCL connects outside of the graph
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y_tH = layer(*static, n_rows_g)
            for part, value in zip(static, given, strict=True):
                part.copy_(value)
            graph.replay()
        else:
            y_tH = layer(*given, n_rows_g)
        x_tH, expert_tk, weight_tk = given
        expected_tH = x_tH.float() * ((expert_tk + 1) * weight_tk).sum(1, keepdim=True)
        if y_tH.shape != x_tH.shape or not torch.allclose(y_tH.float(), expected_tH, rtol=0.03, atol=0.1):
            wrong.append(f"case {case} {n_rows_g}: sums differ")
    return wrong


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("name", ["nccl", "symm_mem"])
def test_rows_and_sums(gpus: RankProcesses, name: str, in_graph: bool) -> None:
    make_group_on_gpus(gpus, ParallelConfig(data=2, expert=True))
    cases = [(8, 8), (1, 1), (64, 64)] if in_graph else [(8, 8), (0, 5), (33, 1), (7, 0)]
    assert gpus.call(exchange_on_gpu, [(name, cases, in_graph)] * 2) == [[], []]


def collect_on_gpu(state: State) -> bytes:
    """Sums and gathers of the tensor ranks; returns the bits of a sum."""
    from fastdeploy.distributed.collectives import Peers, make_collectives
    from fastdeploy.distributed.topology import run_of

    group = state["group"]
    where = group.where
    peers = Peers(where)
    peers.connect(make_collectives(group), None)
    whole_gnN = torch.randn(2, 5, 1001, generator=torch.Generator().manual_seed(0)).cuda()
    total = peers.all_reduce_sum(whole_gnN[where.tensor_rank].clone())
    assert torch.allclose(total, whole_gnN.sum(0))
    first, n_mine = run_of(1001, 2, where.tensor_rank)
    assert torch.equal(peers.gather_columns(whole_gnN[0][:, first : first + n_mine], 1001), whole_gnN[0])
    return total.cpu().numpy().tobytes()


def test_collectives(gpus: RankProcesses) -> None:
    make_group_on_gpus(gpus, ParallelConfig(tensor=2))
    found = gpus.call(collect_on_gpu, [()] * 2)
    assert found[0] == found[1]
