"""Greedy float32 tokens are those of one rank, however many ranks share the requests, the experts and the matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import rank_calls
from parallel_engine import ParallelEngine, Request
from rank_processes import RankProcesses
from tiny_models import FAMILIES, Family, build, edit_config

from fastdeploy.config.schema import ParallelConfig

pytestmark = pytest.mark.timeout(300)

GetModel = Callable[..., Path]
N_WANTED = 6
SPARSE: tuple[Family, ...] = ("ernie4_5_moe", "qwen3_moe")
SIZES = [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4)]  # data, tensor


def prompt(i: int, vocab_size: int = 128) -> list[int]:
    """One of many prompts, of 1 to 23 tokens."""
    return [(7 * i + 31 * j + i * j) % vocab_size for j in range(1 + (i * 5) % 23)]


def requests_of(n_data: int) -> list[list[Request]]:
    """Uneven: rank 0 has most of the work, the last rank none when there are more than two, others start late."""
    requests_d: list[list[Request]] = []
    for d in range(n_data):
        n = 0 if n_data > 2 and d == n_data - 1 else 4 if d == 0 else 1 + d % 2
        requests_d.append([Request(prompt(10 * d + i), N_WANTED - i % 2, arrives_at=2 * d + 3 * i) for i in range(n)])
    return requests_d


@pytest.fixture(scope="module")
def alone(ranks: RankProcesses, tiny_model: GetModel) -> Callable[..., list[list[list[int]]]]:
    """The tokens that one rank gives, every request for itself."""
    known: dict[str, list[int]] = {}

    def get(requests_d: list[list[Request]], family: Family, **options: int) -> list[list[list[int]]]:
        engine = None
        for request in (request for requests in requests_d for request in requests):
            key = f"{family} {options} {request.prompt_ids} {request.n_wanted}"
            if key not in known:
                engine = engine or ParallelEngine(ranks, tiny_model(family, **options), ParallelConfig())
                [[known[key]]] = engine.generate([[Request(request.prompt_ids, request.n_wanted)]])
        return [[known[f"{family} {options} {r.prompt_ids} {r.n_wanted}"] for r in requests] for requests in requests_d]

    return get


@pytest.mark.parametrize(("data", "tensor"), SIZES)
@pytest.mark.parametrize("family", SPARSE)
def test_expert_parallel(
    ranks: RankProcesses,
    tiny_model: GetModel,
    alone: Callable[..., list[list[list[int]]]],
    family: Family,
    data: int,
    tensor: int,
) -> None:
    parallel = ParallelConfig(data=data, tensor=tensor, expert=True)
    expected = alone(requests_of(data), family)
    engine = ParallelEngine(ranks, tiny_model(family), parallel)
    assert engine.generate(requests_of(data)) == expected
    # Every token of every prompt and output but the last went to two experts of each sparse layer, on some rank.
    n_tokens = sum(len(r.prompt_ids) + r.n_wanted - 1 for requests in requests_of(data) for r in requests)
    loads = ranks.call(rank_calls.expert_loads, [()] * parallel.n_ranks)
    for layer in range(len(loads[0])):
        assert sum(sum(of_rank[layer]) for of_rank in loads) == 2 * n_tokens


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("family", SPARSE)
def test_without_expert_parallel(
    ranks: RankProcesses,
    tiny_model: GetModel,
    alone: Callable[..., list[list[list[int]]]],
    family: Family,
    data: int,
    tensor: int,
) -> None:
    expected = alone(requests_of(data), family)
    engine = ParallelEngine(ranks, tiny_model(family), ParallelConfig(data=data, tensor=tensor))
    assert engine.generate(requests_of(data)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel(
    ranks: RankProcesses, tiny_model: GetModel, alone: Callable[..., list[list[list[int]]]], family: Family
) -> None:
    """A vocabulary that two ranks cannot halve; biases where the family may have them."""
    options: dict[str, int] = {"vocab_size": 131}
    options |= {"ernie4_5": {"use_bias": True}, "llama": {"attention_bias": True, "mlp_bias": True}}.get(family, {})
    expected = alone(requests_of(1), family, **options)
    engine = ParallelEngine(ranks, tiny_model(family, **options), ParallelConfig(tensor=2))
    assert engine.generate(requests_of(1)) == expected


def test_sixteen_ranks(ranks: RankProcesses, tiny_model: GetModel, alone: Callable[..., list[list[list[int]]]]) -> None:
    """Eight replicas of two ranks each, an expert on every rank."""
    options = {"moe_num_experts": 16, "moe_k": 3}
    expected = alone(requests_of(8), "ernie4_5_moe", **options)
    folder = tiny_model("ernie4_5_moe", **options)
    engine = ParallelEngine(ranks, folder, ParallelConfig(data=8, tensor=2, expert=True))
    assert engine.generate(requests_of(8)) == expected


@pytest.mark.parametrize("exchange", ["gloo", "shm"])
def test_uneven_experts(
    ranks: RankProcesses, tiny_model: GetModel, alone: Callable[..., list[list[list[int]]]], exchange: str
) -> None:
    """Seven experts on four ranks, by either way of exchanging rows."""
    options = {"moe_num_experts": 7, "moe_k": 3}
    expected = alone(requests_of(4), "ernie4_5_moe", **options)
    folder = tiny_model("ernie4_5_moe", **options)
    engine = ParallelEngine(ranks, folder, ParallelConfig(data=4, expert=True), exchange)
    assert engine.generate(requests_of(4)) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_one_model(ranks: RankProcesses, tmp_path: Path, dtype: str) -> None:
    """Made by each rank for itself, without a checkpoint; `dtype` is that of the checkpoint that there would be."""
    folder = build(tmp_path / "model", "ernie4_5_moe", vocab_size=131, tie_word_embeddings=False)
    edit_config(folder, torch_dtype=dtype)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    requests = [request for of_rank in requests_of(4) for request in of_rank][:4]
    wanted = [(request.prompt_ids, request.n_wanted) for request in requests]

    def tokens(parallel: ParallelConfig, seed: int = 5) -> list[list[int]]:
        engine = ParallelEngine(ranks, folder, parallel, random_seed=seed)
        per_rank = len(wanted) // parallel.data
        parts = [wanted[d * per_rank : (d + 1) * per_rank] for d in range(parallel.data)]
        outputs_d = engine.generate([[Request(*request) for request in part] for part in parts])
        return [output for outputs in outputs_d for output in outputs]

    alone = tokens(ParallelConfig())
    assert tokens(ParallelConfig(tensor=2)) == alone
    assert tokens(ParallelConfig(data=2, expert=True)) == alone
    assert tokens(ParallelConfig(data=2, tensor=2, expert=True)) == alone
    assert tokens(ParallelConfig(), seed=6) != alone


def test_ranks_hold_their_share_only(ranks: RankProcesses, tiny_model: GetModel) -> None:
    whole = ParallelEngine(ranks, tiny_model("llama"), ParallelConfig()).weight_bytes[0]
    halves = ParallelEngine(ranks, tiny_model("llama"), ParallelConfig(tensor=2)).weight_bytes
    assert halves == [whole // 2] * 2
    spread = ParallelEngine(ranks, tiny_model("qwen3_moe"), ParallelConfig(data=2, expert=True)).weight_bytes
    alone = ParallelEngine(ranks, tiny_model("qwen3_moe"), ParallelConfig()).weight_bytes[0]
    expert_bytes = 3 * 64 * 32 * 4
    assert alone - spread[0] >= 4 * expert_bytes
    assert spread[1] == 4 * expert_bytes  # all else is in memory of the first
