"""The plan of a rank's memory against what layers and pages really take, for every family and way to share."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.memory_plan import plan_rank
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import EngineConfig
from fastdeploy.distributed import topology
from fastdeploy.distributed.collectives import Peers
from fastdeploy.layers.attention.base import AttentionShape, make_attention
from fastdeploy.layers.placement import Placement
from fastdeploy.models.checkpoint import Checkpoint
from fastdeploy.models.registry import build_model
from tests.tiny_models import FAMILIES, Family, build

GIB = 1 << 30


def _weights_and_page(config: EngineConfig, number: int) -> tuple[int, int]:
    """Bytes of the weights that rank `number` loads, and of a page."""
    shape, where = config.model.shape, topology.position(config.parallel, number)
    redundant = config.eplb.redundant if config.eplb else None
    place = Placement(
        torch.float32,
        torch.device("cpu"),
        Peers(where),
        quantization=config.model.quantization,
        redundant_experts=redundant,
    )
    heads = AttentionShape(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads // where.n_tensor,
        n_kv_heads=topology.local_kv_heads(shape.n_kv_heads, where)[1],
        head_dim=shape.head_dim,
        page_tokens=config.cache.page_tokens,
    )
    backend = make_attention("torch", heads, place.dtype, place.device)
    model = build_model(shape, backend, place)
    model.load(Checkpoint.open(Path(config.model.path)))
    return model.n_bytes(), backend.page_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tensor", "data", "expert"), [(1, 1, False), (2, 1, False), (1, 4, True), (2, 2, True)])
def test_plan_is_what_layers_take(
    tmp_path: Path, family: Family, dtype: str, tensor: int, data: int, expert: bool
) -> None:
    if expert and not family.endswith("moe"):
        pytest.skip("no experts to spread")
    folder = build(tmp_path / "model", family, dtype=dtype)  # type: ignore[arg-type]
    config = resolve(
        EngineArgs(
            model=str(folder),
            device="cpu",
            tensor_parallel_size=tensor,
            data_parallel_size=data,
            enable_expert_parallel=expert,
            num_gpu_blocks_override=12,
            max_model_len=128,
        )
    )
    for number in range(config.parallel.n_ranks):
        plan = plan_rank(config, number, dtype, GIB)  # type: ignore[arg-type]
        weights, page = _weights_and_page(config, number)
        routers = plan.weights.get("routers", 0)  # which the layers do not count
        assert sum(plan.weights.values()) - routers == weights
        assert (plan.page_bytes, plan.n_pages) == (page, 12)
        assert plan.total_bytes == plan.weight_bytes + 12 * page + plan.buffer_bytes


@pytest.mark.parametrize("redundant", [0, 3])
def test_copies_of_experts_count(tmp_path: Path, redundant: int) -> None:
    folder = build(tmp_path / "model", "ernie4_5_moe")
    sizes = {"data_parallel_size": 3, "enable_expert_parallel": True, "max_model_len": 128, "device": "cpu"}
    settings = {"redundant_experts_num": redundant}
    config = resolve(EngineArgs(model=str(folder), **sizes, enable_eplb=True, eplb_config=settings))  # type: ignore[arg-type]
    for number in range(3):
        plan = plan_rank(config, number, "float32", GIB)
        assert sum(plan.weights.values()) - plan.weights["routers"] == _weights_and_page(config, number)[0]
        assert plan.weights["experts"] == (3 + redundant // 3) * 3 * 64 * 32 * 4
        assert plan.buffers["moves of experts"] > 0


@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
@pytest.mark.parametrize(("tensor", "data", "expert"), [(1, 1, False), (2, 1, False), (1, 2, True)])
def test_quantised_weights_take_what_is_planned(
    tmp_path: Path, quantization: str, tensor: int, data: int, expert: bool
) -> None:
    folder = build(tmp_path / "model", "ernie4_5_moe", dtype="bfloat16")
    config = resolve(
        EngineArgs(
            model=str(folder),
            device="cpu",
            quantization=quantization,
            tensor_parallel_size=tensor,
            data_parallel_size=data,
            enable_expert_parallel=expert,
            max_model_len=128,
        )
    )
    for number in range(config.parallel.n_ranks):
        parts = plan_rank(config, number, "bfloat16", GIB).weights
        assert sum(parts.values()) - parts["routers"] == _weights_and_page(config, number)[0]


def test_biases_count(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    config = resolve(EngineArgs(model=str(folder), device="cpu", tensor_parallel_size=2, max_model_len=128))
    for number in range(2):
        assert plan_rank(config, number, "float32", GIB).weight_bytes == _weights_and_page(config, number)[0]


def test_experts_are_held_once_over_all_ranks(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "qwen3_moe", dtype="bfloat16")
    args = EngineArgs(model=str(folder), device="cpu", max_model_len=128)
    one = plan_rank(resolve(args), 0, "bfloat16", GIB)
    spread = resolve(dataclasses.replace(args, data_parallel_size=8, enable_expert_parallel=True))
    many = [plan_rank(spread, number, "bfloat16", GIB) for number in range(8)]
    assert sum(rank.weights["experts"] for rank in many) == one.weights["experts"]
    assert all(rank.weights["attention"] == one.weights["attention"] for rank in many)
    # The ranks of one machine keep the rest once.
    kept = sum(rank.weight_bytes for rank in many) - 7 * one.weights["routers"]
    assert kept == one.weight_bytes


def test_pages_take_what_is_left(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", dtype="bfloat16")
    config = resolve(EngineArgs(model=str(folder), device="cpu", max_model_len=128, gpu_memory_utilization=0.5))
    on_gpu = dataclasses.replace(config, model=dataclasses.replace(config.model, device="cuda", dtype="bfloat16"))
    plan = plan_rank(on_gpu, 0, "bfloat16", 4 * GIB)
    assert 0.99 * 2 * GIB < plan.weight_bytes + plan.kv_bytes + (600 << 20) <= 2 * GIB
    assert plan_rank(on_gpu, 0, "bfloat16", GIB).n_pages == 0
