"""Checkpoints of every layout are one set of canonical tensors, whole or sliced."""

import gc
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import write_checkpoint
from torch import Tensor

from fastdeploy.errors import CheckpointError
from fastdeploy.models.checkpoint import MAP_FROM_BYTES, Checkpoint
from fastdeploy.models.dequantize import dequantise_blocks
from fastdeploy.models.layouts import Layout, detect_layout

pytestmark = pytest.mark.timeout(120)

TinyModel = Callable[..., Path]
BIAS_PATHS = ("mlp.moe_statics", "mlp.gate.moe_statics", "mlp.gate")
ALIGNED = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
RAGGED = {"hidden_size": 192, "intermediate_size": 160, "head_dim": 40}


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: source.read() for name, source in Checkpoint.open(folder).tensors.items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def expected_tensors(folder: Path) -> dict[str, Tensor]:
    """What the files of an HF folder hold, with the correction bias where it belongs."""
    tensors = tiny_models.load_tensors(folder)
    for name in [n for n in tensors if n.endswith("moe_statics.e_score_correction_bias")]:
        tensors[name.replace("moe_statics", "gate")] = tensors.pop(name)[0]
    return tensors


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, layout) for family in tiny_models.FAMILIES for layout in ("hf", "sharded")),
        *((family, "packed") for family in ("ernie4_5_moe", "qwen3_moe")),
        *((family, "paddle") for family in ("ernie4_5", "ernie4_5_moe")),
    ],
)
def test_layouts_hold_the_same_tensors(tiny_model: TinyModel, family: str, layout: str) -> None:
    folder = tiny_model(family, layout)
    assert Checkpoint.open(folder).layout is (Layout.PADDLE if layout == "paddle" else Layout.HF)
    assert_same_tensors(read_all(folder), expected_tensors(tiny_model(family)))


@pytest.mark.parametrize("layout", ["packed", "paddle"])
def test_bfloat16_and_the_float32_router_keep_their_bits(tiny_model: TinyModel, layout: str) -> None:
    expected = expected_tensors(tiny_model("ernie4_5_moe", dtype="bfloat16"))
    assert expected["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert expected["model.layers.1.mlp.experts.7.up_proj.weight"].dtype == torch.bfloat16
    assert_same_tensors(read_all(tiny_model("ernie4_5_moe", layout, dtype="bfloat16")), expected)


@pytest.mark.parametrize("layout", ["hf", "paddle"])
def test_untied_head_and_biases(tiny_model: TinyModel, layout: str) -> None:
    sizes = {"tie_word_embeddings": False, "use_bias": True, "vocab_size": 96}
    tensors = read_all(tiny_model("ernie4_5", layout, **sizes))
    assert tensors["lm_head.weight"].shape == (96, 64)
    assert tensors["model.layers.0.self_attn.k_proj.bias"].shape == (32,)
    assert_same_tensors(tensors, expected_tensors(tiny_model("ernie4_5", **sizes)))


@pytest.mark.parametrize("sizes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("layout", ["fp8", "paddle_fp8"])
def test_fp8_is_dequantised(tiny_model: TinyModel, layout: str, sizes: dict[str, int]) -> None:
    tensors = read_all(tiny_model("ernie4_5", layout, **sizes))
    assert_same_tensors(tensors, expected_tensors(tiny_model("ernie4_5", f"{layout}_dequantised", **sizes)))


@pytest.mark.parametrize("layout", ["fp8", "paddle_fp8"])
def test_fp8_experts_are_dequantised(tiny_model: TinyModel, layout: str) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 160, "moe_num_experts": 3}
    tensors = read_all(tiny_model("ernie4_5_moe", layout, **sizes))
    assert_same_tensors(tensors, expected_tensors(tiny_model("ernie4_5_moe", f"{layout}_dequantised", **sizes)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_scales_of_any_float_type(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, scales = tiny_models.quantise_blocks(torch.randn(130, 200))
    scales = scales.to(dtype)
    folder = write_checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales})
    assert_same_tensors(read_all(folder), {"a.weight": tiny_models.dequantise_whole(codes, scales)})


def test_fp8_blocks_of_another_size(tmp_path: Path) -> None:
    codes, scales = torch.randn(5, 7).to(torch.float8_e4m3fn), torch.rand(3, 2)
    scheme = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    folder = write_checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, quantization_config=scheme)
    expected = codes.float() * scales.repeat_interleave(2, 0).repeat_interleave(4, 1)[:5, :7]
    assert_same_tensors(read_all(folder), {"a.weight": expected})


def test_paddle_bfloat16_under_a_uint16_header(tmp_path: Path) -> None:
    weight = torch.randn(6, 4).to(torch.bfloat16)
    folder = write_checkpoint(tmp_path, {"ernie.layers.0.self_attn.o_proj.weight": weight.view(torch.uint16)})
    assert_same_tensors(read_all(folder), {"model.layers.0.self_attn.o_proj.weight": weight.t()})


@pytest.mark.parametrize("path", BIAS_PATHS)
@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_correction_bias_under_every_path(tmp_path: Path, path: str, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape)
    folder = write_checkpoint(tmp_path, {f"model.layers.3.{path}.e_score_correction_bias": bias})
    assert_same_tensors(read_all(folder), {"model.layers.3.mlp.gate.e_score_correction_bias": bias.view(8)})


@pytest.mark.parametrize("tied", [True, False])
def test_multi_token_prediction_and_the_head_of_a_tied_model_are_left_out(tmp_path: Path, tied: bool) -> None:
    names = (
        "model.norm.weight",
        "lm_head.weight",
        "model.mtp_block.0.mlp.up_proj.weight",
        "model.mtp_emb_norm.0.weight",
    )
    folder = write_checkpoint(tmp_path, dict.fromkeys(names, torch.ones(2, 2)), tie_word_embeddings=tied)
    assert Checkpoint.open(folder).tensors.keys() == {"model.norm.weight"} | (set() if tied else {"lm_head.weight"})


def test_detect_layout_by_names_or_else_by_orientation() -> None:
    embed = {"model.embed_tokens.weight": (100, 64)}
    assert detect_layout(embed) is Layout.HF
    for name in ("ernie.norm.weight", "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.x.quant_weight"):
        assert detect_layout({**embed, name: (64, 96)}) is Layout.PADDLE
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert detect_layout({**embed, name: (64, 96)}) is Layout.PADDLE
        assert detect_layout({**embed, name: (96, 64)}) is Layout.HF


def test_unfused_paddle_tensors_are_transposed(tmp_path: Path) -> None:
    embed, up = torch.randn(10, 4), torch.randn(4, 6)
    folder = write_checkpoint(tmp_path, {"model.embed_tokens.weight": embed, "model.layers.0.mlp.up_proj.weight": up})
    expected = {"model.embed_tokens.weight": embed, "model.layers.0.mlp.up_proj.weight": up.t()}
    assert_same_tensors(read_all(folder), expected)


# --- reading -------------------------------------------------------------------------------------------------------

bounds = st.one_of(st.none(), st.integers(-220, 220))
slices = st.one_of(st.none(), st.builds(slice, bounds, bounds))


@pytest.mark.parametrize("layout", ["hf", "packed", "paddle", "fp8", "paddle_fp8"])
def test_slices_are_slices_of_the_whole(tiny_model: TinyModel, layout: str) -> None:
    sizes = {"hidden_size": 200, "moe_intermediate_size": 136, "moe_num_experts": 2, "num_hidden_layers": 2}
    checkpoint = Checkpoint.open(tiny_model("ernie4_5_moe", layout, head_dim=50, **sizes))
    whole = {name: source.read() for name, source in checkpoint.tensors.items()}

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(sorted(whole)), slices, slices)
    @example("model.layers.0.self_attn.k_proj.weight", slice(3, 40), slice(100, 140))
    @example("model.layers.1.mlp.experts.1.up_proj.weight", slice(120, 130), slice(127, 129))
    def check(name: str, rows: slice | None, columns: slice | None) -> None:
        source = checkpoint.tensors[name]
        if len(source.shape) == 1:
            assert torch.equal(source.read(rows), whole[name][rows or slice(None)])
        else:
            assert torch.equal(source.read(rows, columns), whole[name][rows or slice(None), columns or slice(None)])

    check()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17))
def test_dequantised_rectangles(
    data: st.DataObject, n_rows: int, n_columns: int, block_rows: int, block_cols: int
) -> None:
    codes = torch.randn(n_rows, n_columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-n_rows // block_rows), -(-n_columns // block_cols))
    whole = (
        scales.repeat_interleave(block_rows, 0).repeat_interleave(block_cols, 1)[:n_rows, :n_columns] * codes.float()
    )
    row, column = data.draw(st.integers(0, n_rows)), data.draw(st.integers(0, n_columns))
    part = codes[row:, column:]
    assert torch.equal(dequantise_blocks(part, scales, row, column, (block_rows, block_cols)), whole[row:, column:])


def test_large_tensors_lie_in_the_file_and_writing_to_them_does_not_change_it(tmp_path: Path) -> None:
    weight = torch.randn(1030, 515)
    assert weight.nbytes > 2 * MAP_FROM_BYTES
    folder = write_checkpoint(tmp_path, {"model.norm.weight": torch.ones(3), "a.weight": weight})
    source = Checkpoint.open(folder).tensors["a.weight"]
    first = source.read()
    first.zero_()
    assert torch.equal(source.read(), weight)
    assert torch.equal(source.read(slice(1, 1029), slice(5, 500)), weight[1:1029, 5:500])


def test_large_unaligned_tensors_can_be_read(tmp_path: Path) -> None:
    weight = torch.randn(1030, 515)
    entry = {"dtype": "F32", "shape": [1030, 515], "data_offsets": [1, 1 + weight.nbytes]}
    header = json.dumps({"a.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    folder = write_checkpoint(tmp_path, {})
    content = len(header).to_bytes(8, "little") + header + b"\0" + weight.numpy().tobytes()
    (folder / "model.safetensors").write_bytes(content)
    assert_same_tensors(read_all(folder), {"a.weight": weight})


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    n_rows, n_tensors = 4096, 8
    folder = write_checkpoint(tmp_path, {f"{i}.weight": torch.ones(n_rows, 1024) for i in range(n_tensors)})
    checkpoint = Checkpoint.open(folder)
    target = torch.zeros(n_rows, 1024)
    fds = Path("/proc/self/fd")
    n_open = len(list(fds.iterdir()))

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    gc.collect()
    before = resident_bytes()
    for source in checkpoint.tensors.values():
        target.copy_(source.read())
    assert resident_bytes() - before < 2 * target.nbytes  # all of them together are eight times as large
    assert len(list(fds.iterdir())) == n_open


def test_steps_and_columns_of_vectors_are_refused(tiny_model: TinyModel) -> None:
    tensors = Checkpoint.open(tiny_model("llama")).tensors
    with pytest.raises(ValueError, match="step"):
        tensors["lm_head.weight"].read(slice(0, 8, 2))
    with pytest.raises(ValueError, match="no columns"):
        tensors["model.norm.weight"].read(None, slice(0, 2))


def test_require_and_unused(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("ernie4_5", "paddle"))
    name = "model.layers.0.self_attn.k_proj.weight"
    source = checkpoint.require(name, (32, 64))
    assert (source.name, source.dtype, source.file.name) == (name, torch.float32, "model.safetensors")
    assert source.stored_name == "ernie.layers.0.self_attn.qkv_proj.weight"
    with pytest.raises(
        CheckpointError, match=r"k_proj\.weight \(stored as .*qkv_proj.*\[32, 64\], expected \[64, 64\]"
    ):
        checkpoint.require(name, (64, 64))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.x \[3\] is missing"):
        checkpoint.require("model.layers.9.x", (3,))
    assert checkpoint.unused(checkpoint.tensors.keys() - {name}) == [name]


# --- the reference -------------------------------------------------------------------------------------------------


def test_tiny_models_are_worth_comparing_with(tiny_model: TinyModel) -> None:
    """The correction bias is not zero, logits differ between tokens, and the tokenizer reads its own chat template."""
    folder = tiny_model("ernie4_5_moe", tokenizer=True)
    assert tiny_models.load_tensors(folder)["model.layers.1.mlp.moe_statics.e_score_correction_bias"].std() > 0.01
    with torch.no_grad():
        logits = tiny_models.reference_model(folder)(torch.arange(20)[None]).logits[0]
    assert logits.shape == (20, 128) and logits.std() > 0.5 and logits.argmax(-1).unique().numel() > 3
