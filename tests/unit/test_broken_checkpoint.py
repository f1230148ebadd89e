"""Broken checkpoint files and foreign quantisations are refused, and the error names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_checkpoint

from fastdeploy.errors import CheckpointError, ConfigError
from fastdeploy.models.checkpoint import Checkpoint

pytestmark = pytest.mark.timeout(120)

TinyModel = Callable[..., Path]


def assert_refused(folder: Path, *words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        Checkpoint.open(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def broken(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "broken"))


@pytest.fixture
def broken_shards(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama", "sharded"), tmp_path / "broken"))


def test_a_truncated_file_is_named_with_its_sizes(broken: Path) -> None:
    path = broken / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert_refused(broken, str(path), "truncated", str(len(content)), str(len(content) - 5))
    path.write_bytes(content[:100])
    assert_refused(broken, str(path), "truncated", "100")
    path.write_bytes(content + b"x")
    assert_refused(broken, str(path), "longer", str(len(content)))


def test_a_file_truncated_after_opening(broken: Path) -> None:
    checkpoint = Checkpoint.open(broken)
    last = max(checkpoint.tensors.values(), key=lambda source: source._stored.offset)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated after it was opened"):
        last.read()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", "not a safetensors file"),
        (b"\x04\0\0\0\0\0\0\0{'a'", "not valid JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a JSON object"),
        (b"\x02\0\0\0\0\0\0\0\xff\xff", "not valid JSON"),
        ((1 << 20).to_bytes(8, "little") + b"[" * (1 << 20), "not valid JSON"),
    ],
)
def test_a_corrupt_header_is_named(broken: Path, content: bytes, word: str) -> None:
    (broken / "model.safetensors").write_bytes(content)
    assert_refused(broken, "model.safetensors", word)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}, "16 by its shape"),
        ({"dtype": "F32", "shape": [-2, 2], "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "malformed"),
        ({"dtype": "F32", "shape": [2]}, "malformed"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "F4"),
        ({"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}, "I32"),
        (None, "malformed"),
    ],
)
def test_a_bad_header_entry_is_named(broken: Path, entry: Any, word: str) -> None:
    header = json.dumps({"model.norm.weight": entry}).encode()
    (broken / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert_refused(broken, "model.safetensors", "model.norm.weight", word)


def test_a_missing_shard_is_named(broken_shards: Path) -> None:
    shard = broken_shards / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert_refused(broken_shards, str(shard), "missing")


def test_a_tensor_that_is_not_in_its_shard_is_named(broken_shards: Path) -> None:
    index = broken_shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    assert_refused(broken_shards, "model-00001-of-00003.safetensors", "model.ghost")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not valid JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "beside it"),
        ('{"weight_map": {"a": 3}}', "beside it"),
    ],
)
def test_a_bad_index_is_named(broken_shards: Path, content: str, word: str) -> None:
    (broken_shards / "model.safetensors.index.json").write_text(content)
    assert_refused(broken_shards, "model.safetensors.index.json", word)


def test_shards_without_an_index_and_folders_without_weights(broken_shards: Path) -> None:
    (broken_shards / "model.safetensors.index.json").unlink()
    assert_refused(broken_shards, "3 safetensors files", "index")
    for file in broken_shards.glob("*.safetensors"):
        file.unlink()
    assert_refused(broken_shards, str(broken_shards), "no weights")


def test_tensors_that_cannot_be_told_apart_or_split_are_named(tmp_path: Path) -> None:
    twice = {
        f"model.layers.0.{path}.e_score_correction_bias": torch.ones(4) for path in ("mlp.moe_statics", "mlp.gate")
    }
    assert_refused(write_checkpoint(tmp_path / "twice", twice), "moe_statics", "both")
    prefix = "ernie.layers.0.self_attn"
    no_o_proj = {f"{prefix}.qkv_proj.weight": torch.ones(8, 16)}
    assert_refused(write_checkpoint(tmp_path / "a", no_o_proj), "qkv_proj", "o_proj.weight is missing")
    odd = no_o_proj | {f"{prefix}.o_proj.weight": torch.ones(7, 8)}
    assert_refused(write_checkpoint(tmp_path / "b", odd), "qkv_proj", "16 columns")
    equal_heads = {f"{prefix}.qkv_proj.weight": torch.ones(8, 24), f"{prefix}.o_proj.weight": torch.ones(8, 8)}
    assert_refused(write_checkpoint(tmp_path / "c", equal_heads), "qkv_proj", "order is not defined")


# --- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, ("quant_method", "'awq'")),
        ({"quant_method": "fp8"}, ("fp8", "weight_block_size")),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ("weight_block_size", "[128, 0]")),
        ({"quantization": "wint8"}, ("quantization", "'wint8'")),
        ({"quantization": "w4a8", "is_quantized": True}, ("quantization", "'w4a8'")),
        ({"quantization": "mix_quant", "moe_quant_type": "w4afp8"}, ("moe_quant_type", "'w4afp8'")),
        ({"quantization": "tensor_wise_fp8"}, ("quantization", "'tensor_wise_fp8'")),
        ({}, ("quantization", "None")),
        ("fp8", ("quantization_config", "'fp8'")),
    ],
)
def test_foreign_quantisation_is_refused_by_name(tmp_path: Path, scheme: Any, words: tuple[str, ...]) -> None:
    folder = write_checkpoint(tmp_path, {"a.weight": torch.ones(2, 2)}, quantization_config=scheme)
    assert_refused(folder, *words, error=ConfigError)


def test_a_scheme_for_load_time_leaves_plain_weights_readable(tmp_path: Path) -> None:
    scheme, weights = {"quantization": "wint8", "is_quantized": False}, {"ernie.norm.weight": torch.ones(2)}
    folder = write_checkpoint(tmp_path / "plain", weights, quantization_config=scheme)
    assert torch.equal(Checkpoint.open(folder).tensors["model.norm.weight"].read(), torch.ones(2))
    codes = {"ernie.layers.0.mlp.down_proj.quant_weight": torch.ones(4, 4, dtype=torch.int8)}
    folder = write_checkpoint(tmp_path / "codes", weights | codes, quantization_config=scheme)
    assert_refused(folder, "wint8", error=ConfigError)


def test_codes_without_scales_or_with_scales_of_another_shape_are_named(tmp_path: Path) -> None:
    codes, plain = torch.ones(130, 4).to(torch.float8_e4m3fn), torch.ones(130, 4)
    assert_refused(write_checkpoint(tmp_path / "a", {"a.weight": codes}), "a.weight", "a.weight_scale_inv are missing")
    wrong = {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1)}
    assert_refused(write_checkpoint(tmp_path / "b", wrong), "a.weight_scale_inv", "[1, 1]", "[2, 1]")
    per_channel = {"ernie.a.quant_weight": codes.view(torch.int8), "ernie.a.weight_scale": torch.ones(4)}
    assert_refused(write_checkpoint(tmp_path / "c", per_channel), "ernie.a.weight_scale", "[4]", "[2, 1]")
    no_codes = {"ernie.a.quant_weight": plain, "ernie.a.weight_scale": torch.ones(2, 1)}
    assert_refused(write_checkpoint(tmp_path / "d", no_codes), "ernie.a.quant_weight", "FP8")
