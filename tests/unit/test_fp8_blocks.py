"""Block-wise FP8 weights of a checkpoint reach the layers as they are stored: codes and scales bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdeploy.distributed.sharding import FFNShare
from fastdeploy.kernels.weight_formats import dequantize
from fastdeploy.layers.moe.expert_stacks import Part, load_stacks
from fastdeploy.layers.placement import Placement
from fastdeploy.layers.rotary import pairs_side_by_side
from fastdeploy.models.checkpoint import Checkpoint
from fastdeploy.models.fp8_blocks import read_blocks
from fastdeploy.models.random_weights import RandomWeights
from fastdeploy.models.weights import WeightSource
from tests.tiny_models import load_tensors, quantise_blocks, write_checkpoint

pytestmark = pytest.mark.timeout(60)
TinyModel = Callable[..., Path]
HIDDEN, WIDTH, N_EXPERTS = 256, 128, 3
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "moe_intermediate_size": WIDTH,
    "moe_num_experts": N_EXPERTS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
PLACE = Placement(torch.bfloat16, torch.device("cpu"), quantization="block_wise_fp8")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == torch.float8_e4m3fn and found[1].dtype == torch.float32
    assert torch.equal(bits(found[0]), bits(expected[0]))
    assert torch.equal(found[1], expected[1].float())


def parts_of(weights: WeightSource, expert: int, width: int = WIDTH) -> tuple[Part, Part, Part]:
    name = f"model.layers.1.mlp.experts.{expert}"
    gate, up = (Part(weights.require(f"{name}.{x}_proj.weight", (width, HIDDEN))) for x in ("gate", "up"))
    return gate, up, Part(weights.require(f"{name}.down_proj.weight", (HIDDEN, width)))


def test_experts_are_stacked_as_they_are_stored(tiny_model: TinyModel) -> None:
    folder = tiny_model("ernie4_5_moe", "fp8", **SIZES)
    stored = load_tensors(folder)
    checkpoint = Checkpoint.open(folder)
    stacks = load_stacks([parts_of(checkpoint, i) for i in range(N_EXPERTS)], HIDDEN, WIDTH, PLACE)
    for i in range(N_EXPERTS):
        name = f"model.layers.1.mlp.experts.{i}"
        for stack, projections in zip(stacks, (("gate_proj", "up_proj"), ("down_proj",)), strict=True):
            codes = torch.cat([bits(stored[f"{name}.{p}.weight"]) for p in projections]).view(torch.float8_e4m3fn)
            scales = torch.cat([stored[f"{name}.{p}.weight_scale_inv"] for p in projections])
            assert stack[1] is not None
            assert_same_bits((stack[0][i], stack[1][i]), (codes, scales))


@pytest.mark.parametrize("layout", ["fp8", "paddle_fp8"])
def test_every_projection_has_the_numbers_that_it_is_read_as(tiny_model: TinyModel, layout: str) -> None:
    """Also where matrices are stored transposed and fused."""
    checkpoint = Checkpoint.open(tiny_model("ernie4_5_moe", layout, **SIZES))
    n_found = 0
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith("_proj.weight"):
            assert tensor.as_fp8() is None
            continue
        found = read_blocks([tensor], [None])
        assert found is not None, name
        assert torch.equal(dequantize(*found, tensor.shape[1]), tensor.read())
        n_found += 1
    assert n_found == 2 * 4 + 3 + 3 * (N_EXPERTS + 1)


def test_a_rank_gets_its_share_of_blocks(tmp_path: Path) -> None:
    tensors, stored = {}, {}
    shapes = {"gate_proj": (2 * WIDTH, HIDDEN), "up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, 2 * WIDTH)}
    for name, shape in shapes.items():
        codes, scales = stored[name] = quantise_blocks(torch.randn(shape))
        tensors[f"model.layers.1.mlp.experts.0.{name}.weight"] = codes
        tensors[f"model.layers.1.mlp.experts.0.{name}.weight_scale_inv"] = scales.bfloat16()
        stored[name] = codes, scales.bfloat16()
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors, quantization_config=scheme))
    gate_up, down = load_stacks([parts_of(FFNShare(checkpoint, 2, 1), 0)], HIDDEN, WIDTH, PLACE)
    assert gate_up[1] is not None and down[1] is not None
    for half, name in ((0, "gate_proj"), (1, "up_proj")):
        rows, blocks = slice(half * WIDTH, (half + 1) * WIDTH), slice(half, half + 1)
        codes, scales = stored[name]
        assert_same_bits((gate_up[0][0, rows], gate_up[1][0, blocks]), (codes[WIDTH:], scales[1:]))
    codes, scales = stored["down_proj"]
    assert_same_bits((down[0][0], down[1][0]), (codes[:, WIDTH:], scales[:, 1:]))
    # A quarter ends within blocks.
    whole = FFNShare(checkpoint, 4, 1).require("model.layers.1.mlp.experts.0.up_proj.weight", (WIDTH // 2, HIDDEN))
    assert whole.as_fp8() is None


@pytest.mark.parametrize(("head_dim", "stays"), [(128, True), (64, True), (96, False), (256, False)])
def test_rows_may_be_reordered_within_blocks_only(tmp_path: Path, head_dim: int, stays: bool) -> None:
    codes, scales = quantise_blocks(torch.randn(768, 128))
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write_checkpoint(
        tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, quantization_config=scheme
    )  # fmt: skip
    tensor = Checkpoint.open(folder).require("a.weight", (768, 128))

    def order(rows: Tensor) -> Tensor:
        return pairs_side_by_side(rows, head_dim=head_dim)

    found = read_blocks([tensor], [order])
    assert (found is not None) == stays
    if found is not None:
        assert torch.equal(dequantize(*found, 128), order(tensor.read()))


def test_what_is_not_in_whole_blocks_is_rounded_anew(tmp_path: Path) -> None:
    codes, scales = torch.randn(128, 128).to(torch.float8_e4m3fn), torch.rand(2, 2)
    scheme = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    folder = write_checkpoint(
        tmp_path / "a", {"a.weight": codes, "a.weight_scale_inv": scales}, quantization_config=scheme
    )
    assert read_blocks([Checkpoint.open(folder).require("a.weight", (128, 128))], [None]) is None
    weights = RandomWeights(1, 0)
    stacks = load_stacks([parts_of(weights, i) for i in range(2)], HIDDEN, WIDTH, PLACE)
    for stack in stacks:
        assert stack[0].dtype == torch.float8_e4m3fn and stack[1] is not None and stack[1].dtype == torch.float32
    gate = weights.require("model.layers.1.mlp.experts.1.gate_proj.weight", (WIDTH, HIDDEN)).read()
    assert stacks[0][1] is not None
    back = dequantize(stacks[0][0][1, :WIDTH], stacks[0][1][1, :1], HIDDEN)
    assert (back - gate).norm() / gate.norm() < 0.04
