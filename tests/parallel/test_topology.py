"""The arithmetic of ranks: every thing is held once, every number lies where it must, and what cannot work is said."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.config.schema import ModelShape, MoEShape, ParallelConfig, RopeShape
from fastdeploy.distributed import topology
from fastdeploy.wire.messages import StepAgreement

pytestmark = pytest.mark.timeout(60)
search = settings(max_examples=100, derandomize=True, deadline=None, database=None)

MOE = MoEShape(
    n_experts=64,
    n_experts_per_token=6,
    expert_width=48,
    shared_width=96,
    layers=tuple(range(1, 4)),
    has_correction_bias=True,
    renormalise=True,
    norm_min=1e-12,
    gate_in_float32=True,
)
SHAPE = ModelShape(
    architecture="Ernie4_5_MoeForCausalLM",
    family="ernie4_5_moe",
    hidden_size=64,
    n_layers=4,
    n_heads=12,
    n_kv_heads=4,
    head_dim=16,
    ffn_width=96,
    vocab_size=128,
    max_positions=256,
    norm_eps=1e-5,
    tied_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope=RopeShape(theta=1e4, style="interleaved"),
    moe=MOE,
)


@st.composite
def parallels(draw: st.DrawFn) -> ParallelConfig:
    """Group sizes that make sense by themselves."""
    n_hosts = draw(st.integers(1, 4))
    hosts = tuple(f"10.0.0.{i}" for i in range(n_hosts))
    data = n_hosts * draw(st.integers(1, 4))
    return ParallelConfig(tensor=draw(st.integers(1, 4)), data=data, expert=draw(st.booleans()), hosts=hosts)


@search
@given(parallels())
def test_numbers(parallel: ParallelConfig) -> None:
    devices: Counter[tuple[str, int]] = Counter()
    for number in range(parallel.n_ranks):
        where = topology.position(parallel, number)
        group = topology.numbers_of_group(parallel, number)
        assert where.number == number and group[where.group_rank] == number
        assert len(group) == where.group_size == parallel.group_size
        own = replace(parallel, data_rank=where.data_rank)
        assert topology.host_of(parallel, number) == own.host
        devices[own.host, topology.local_device(parallel, number)] += 1
    n_here = topology.ranks_per_host(parallel)
    assert devices == Counter({(host, i): 1 for host in parallel.hosts for i in range(n_here)})


@search
@given(st.integers(0, 200), st.integers(1, 17))
def test_runs(n_total: int, n_parts: int) -> None:
    runs = [topology.run_of(n_total, n_parts, part) for part in range(n_parts)]
    assert [i for first, n in runs for i in range(first, first + n)] == list(range(n_total))
    assert max(n for _, n in runs) - min(n for _, n in runs) <= 1


@search
@given(parallels(), st.integers(16, 70))
def test_experts(parallel: ParallelConfig, n_experts: int) -> None:
    """Spread, each is on one rank of a group; otherwise every rank has all."""
    moe = replace(MOE, n_experts=n_experts)
    held: list[int] = []
    for number in range(parallel.n_ranks):
        where = topology.position(parallel, number)
        first, n = topology.local_experts(moe, where)
        held += range(first, first + n)
        assert where.spreads_experts or (first, n) == (0, n_experts)
    n_copies = 1 if parallel.expert else parallel.n_ranks
    assert sorted(held) == sorted([*range(n_experts)] * n_copies)


@pytest.mark.parametrize(
    ("n_kv_heads", "n_tensor", "expected"),
    [
        (4, 2, [(0, 2), (2, 2)]),
        (2, 2, [(0, 1), (1, 1)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 2, [(0, 1)] * 2),
    ],
)
def test_key_heads(n_kv_heads: int, n_tensor: int, expected: list[tuple[int, int]]) -> None:
    """Query heads of a rank are those that its key heads serve."""
    places = [topology.Position(n_tensor=n_tensor, tensor_rank=part) for part in range(n_tensor)]
    assert [topology.local_kv_heads(n_kv_heads, where) for where in places] == expected


@search
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_rows_to_dispatch(n_tokens_d: list[int], n_tensor: int, use_graph: bool) -> None:
    agreement = StepAgreement(n_tokens_d, max(n_tokens_d), use_graph)
    n_rows_g = topology.rows_to_dispatch(agreement, n_tensor)
    per_replica = [sum(n_rows_g[d * n_tensor : (d + 1) * n_tensor]) for d in range(len(n_tokens_d))]
    assert per_replica == ([max(n_tokens_d)] * len(n_tokens_d) if use_graph else n_tokens_d)


@search
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.one_of(st.none(), st.integers(8, 100)))
def test_pieces(n_rows_g: list[int], max_rows: int | None) -> None:
    """All rows once, in order, never more than fit, and no piece for nothing."""
    seen: list[list[int]] = [[] for _ in n_rows_g]
    for piece in topology.cut_into_pieces(tuple(n_rows_g), max_rows):
        assert 0 < sum(piece.n_rows_g) <= (max_rows or 10**9)
        for rows, first, n in zip(seen, piece.first_g, piece.n_rows_g, strict=True):
            rows += range(first, first + n)
    assert seen == [list(range(n)) for n in n_rows_g]


def test_what_works() -> None:
    for parallel in (
        ParallelConfig(),
        ParallelConfig(tensor=4, data=2),
        ParallelConfig(tensor=12, data=5, expert=True),  # three tensor ranks share a key head
        ParallelConfig(data=64, expert=True, hosts=("10.0.0.1", "10.0.0.2"), data_rank=63),
    ):
        assert topology.contradictions(parallel, SHAPE) == []


def lines_about(parallel: ParallelConfig, **changes: object) -> list[str]:
    """The contradictions with a shape that differs from SHAPE by `changes`."""
    return topology.contradictions(parallel, replace(SHAPE, **changes))  # type: ignore[arg-type]


def test_every_contradiction_is_reported_at_once() -> None:
    parallel = ParallelConfig(tensor=5, data=15, expert=True, data_rank=15, hosts=("10.0.0.1", "10.0.0.1"))
    lines = lines_about(parallel)
    for expected in (
        "--data-parallel-size 15: --ips names 2 machines",
        "10.0.0.1 is named twice",
        "--local-data-parallel-id 15: must be in 0..14",
        "--tensor-parallel-size 5: must divide the attention heads, 12;",
        "--tensor-parallel-size 5: must divide the width of the feed-forward network, 96;",
        "--tensor-parallel-size 5: must divide the width of the shared expert, 96;",
        "--tensor-parallel-size 5: must divide the key heads, 4, or be a multiple",
        "--enable-expert-parallel: the model has 64 experts for 75 ranks",
    ):
        assert sum(expected in line for line in lines) == 1, expected
    assert len(lines) == 8
    assert "can be split over 1, 2, 4, 12" in next(line for line in lines if "heads, 12" in line)


def test_sizes_below_one() -> None:
    lines = lines_about(ParallelConfig(tensor=0, data=-1, hosts=()))
    assert [line.split()[0] for line in lines] == ["--tensor-parallel-size", "--data-parallel-size", "--ips:"]


def test_experts_are_cut_only_where_they_are_not_spread() -> None:
    moe = replace(MOE, expert_width=49)
    assert lines_about(ParallelConfig(tensor=2, expert=True), moe=moe) == []
    (line,) = lines_about(ParallelConfig(tensor=2), moe=moe)
    assert "width of an expert" in line and "--enable-expert-parallel" in line


def test_a_model_without_experts() -> None:
    (line,) = lines_about(ParallelConfig(data=2, expert=True), moe=None)
    assert line.startswith("--enable-expert-parallel: Ernie4_5_MoeForCausalLM has no experts")
    assert lines_about(ParallelConfig(data=2), moe=None) == []


@search
@given(parallels())
def test_equal_weights(parallel: ParallelConfig) -> None:
    """Who shares weights agrees about it, is on one machine and in one group, and holds the same shares of layers."""
    for number in range(parallel.n_ranks):
        others = topology.numbers_with_equal_weights(parallel, number)
        assert number in others
        assert set(others) <= set(topology.numbers_of_group(parallel, number))
        assert len({topology.host_of(parallel, other) for other in others}) == 1
        assert {topology.position(parallel, other).tensor_rank for other in others} == {number % parallel.tensor}
        assert all(topology.numbers_with_equal_weights(parallel, other) == others for other in others)
        n_replicas_here = parallel.data // len(parallel.hosts)
        assert len(others) == (n_replicas_here if parallel.expert else 1)
