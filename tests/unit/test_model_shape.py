"""config.json of every family, in old and new keys, with defaults by layout; what is not computed is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_configs import ERNIE_0_3B, ERNIE_21B, ERNIE_300B, LLAMA3, LLAMA_8B, QWEN3_30B

from fastdeploy.config.model_shape import read_model_shape
from fastdeploy.config.schema import ModelShape, MoEShape, RopeShape
from fastdeploy.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.timeout(120)

TinyModel = Callable[..., Path]


def read(folder: Path, config: Any) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_shape(folder)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def moe_of(shape: ModelShape) -> MoEShape:
    assert shape.moe is not None
    return shape.moe


def test_ernie_0_3b(tmp_path: Path) -> None:
    assert read(tmp_path, ERNIE_0_3B) == ModelShape(
        architecture="Ernie4_5ForCausalLM",
        family="ernie4_5",
        hidden_size=1024,
        n_layers=18,
        n_heads=16,
        n_kv_heads=2,
        head_dim=128,
        ffn_width=3072,
        vocab_size=103424,
        max_positions=131072,
        norm_eps=1e-5,
        tied_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeShape(theta=500000.0, style="interleaved"),
    )


def test_ernie_21b(tmp_path: Path) -> None:
    shape = read(tmp_path, ERNIE_21B)
    assert (shape.family, shape.head_dim, shape.n_kv_heads) == ("ernie4_5_moe", 128, 4)
    assert shape.moe == MoEShape(
        n_experts=64,
        n_experts_per_token=6,
        expert_width=1536,
        shared_width=3072,
        layers=tuple(range(1, 28)),
        has_correction_bias=True,
        renormalise=True,
        norm_min=1e-12,
        gate_in_float32=True,
    )


def test_ernie_300b(tmp_path: Path) -> None:
    shape = read(tmp_path, ERNIE_300B)
    moe = moe_of(shape)
    assert (shape.tied_embeddings, moe.shared_width, moe.layers) == (False, 0, tuple(range(3, 54)))


def test_qwen3_30b(tmp_path: Path) -> None:
    shape = read(tmp_path, QWEN3_30B)
    assert (shape.head_dim, shape.n_heads, shape.qk_norm) == (128, 32, True)
    assert shape.rope == RopeShape(theta=1e6, style="half_split")
    assert shape.moe == MoEShape(
        n_experts=128,
        n_experts_per_token=8,
        expert_width=768,
        shared_width=0,
        layers=tuple(range(48)),
        has_correction_bias=False,
        renormalise=True,
        norm_min=0.0,
        gate_in_float32=False,
    )


def test_llama_8b(tmp_path: Path) -> None:
    shape = read(tmp_path, LLAMA_8B)
    assert (shape.head_dim, shape.tied_embeddings, shape.moe) == (128, False, None)
    assert shape.rope == RopeShape(theta=500000.0, style="half_split", scaling=LLAMA3)


@pytest.mark.parametrize("config", [ERNIE_0_3B, ERNIE_21B, QWEN3_30B, LLAMA_8B], ids=lambda c: c["architectures"][0])
def test_new_keys_mean_the_same_as_old_ones(tmp_path: Path, config: dict[str, Any]) -> None:
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    new = without(config, "rope_theta", "rope_scaling", "torch_dtype", "num_experts")
    new |= {"rope_parameters": rope, "dtype": "bfloat16", "transformers_version": "5.23.0"}
    if "num_experts" in config:
        new["num_local_experts"] = config["num_experts"]
    assert read(tmp_path, new) == read(tmp_path, config)


@pytest.mark.parametrize("family", ["ernie4_5", "ernie4_5_moe", "llama", "qwen3", "qwen3_moe"])
def test_configs_written_by_transformers(tiny_model: TinyModel, family: str) -> None:
    shape = read_model_shape(tiny_model(family))
    assert (shape.family, shape.head_dim, shape.hidden_size, shape.n_layers) == (family, 16, 64, 2)
    assert shape.tied_embeddings is family.startswith("ernie")
    if family.endswith("moe"):
        moe = moe_of(shape)
        assert (moe.layers, moe.n_experts, moe.n_experts_per_token, moe.expert_width) == ((1,), 8, 2, 32)
        assert moe.has_correction_bias is family.startswith("ernie")


@pytest.mark.parametrize(
    ("start", "end", "interval", "layers"),
    [
        (0, -1, 1, (0, 1, 2, 3, 4, 5)),
        (1, 4, 1, (1, 2, 3, 4)),
        (1, -1, 2, (1, 3, 5)),
        (2, -1, 3, (2, 5)),
        (0, 3, 2, (1, 3)),
    ],
)
def test_sparse_layers_of_ernie(tmp_path: Path, start: int, end: int, interval: int, layers: tuple[int, ...]) -> None:
    keys = {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}
    assert moe_of(read(tmp_path, ERNIE_21B | keys | {"num_hidden_layers": 6})).layers == layers


def test_sparse_layers_of_qwen(tmp_path: Path) -> None:
    keys = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert moe_of(read(tmp_path, QWEN3_30B | keys)).layers == (1, 5)


def test_a_model_whose_layers_are_all_dense_has_no_sparse_part(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3_30B | {"num_experts": 0}).moe is None
    assert read(tmp_path, ERNIE_21B | {"moe_layer_start_index": 28}).moe is None


DEFAULTED = (
    "tie_word_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "moe_num_shared_experts",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_use_aux_free",
)


def test_missing_keys_default_by_layout(tmp_path: Path) -> None:
    shape = read(tmp_path, without(ERNIE_21B, *DEFAULTED))
    moe = moe_of(shape)
    assert (shape.tied_embeddings, shape.rope.theta, shape.norm_eps) == (True, 500000.0, 1e-5)
    assert (moe.shared_width, moe.layers[0], moe.has_correction_bias) == (3072, 1, True)
    shape = read(tmp_path, without(ERNIE_21B, *DEFAULTED, "torch_dtype") | {"dtype": "bfloat16"})
    moe = moe_of(shape)
    assert (shape.tied_embeddings, shape.rope.theta, shape.norm_eps) == (False, 10000.0, 1e-5)
    assert (moe.shared_width, moe.layers[0], moe.has_correction_bias) == (0, 0, False)


@pytest.mark.parametrize(("layout", "is_tied"), [("hf", True), ("paddle", False)])
def test_the_layout_is_told_by_the_tensors(tiny_model: TinyModel, tmp_path: Path, layout: str, is_tied: bool) -> None:
    source = tiny_model("ernie4_5_moe", layout)
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    config = without(json.loads((source / "config.json").read_text()), *DEFAULTED, "dtype")
    for misleading in ({"torch_dtype": "float32"}, {"dtype": "float32"}):
        shape = read(tmp_path, config | misleading)
        assert shape.tied_embeddings is is_tied
        assert moe_of(shape).has_correction_bias


@pytest.mark.parametrize("layout", ["hf", "paddle", "paddle_fp8"])
def test_a_missing_head_dim_is_read_off_the_tensors(tiny_model: TinyModel, tmp_path: Path, layout: str) -> None:
    source = tiny_model("ernie4_5", layout, head_dim=24)
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    assert read(tmp_path, without(json.loads((source / "config.json").read_text()), "head_dim")).head_dim == 24


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("table", "scaling"),
    [
        ({"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_type": "default"}, None),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768.0},
        ),
        (
            {"rope_type": "yarn", "factor": 2, "mscale": 1.0, "mscale_all_dim": 0, "beta_fast": 32, "truncate": True},
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "mscale": 1.0,
                "beta_fast": 32.0,
                "original_max_position_embeddings": 40960.0,
            },
        ),
    ],
)
def test_rope_scalings(tmp_path: Path, key: str, table: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    assert read(tmp_path, QWEN3_30B | {key: table}).rope == RopeShape(theta=1e6, style="half_split", scaling=scaling)


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (ERNIE_0_3B, "compression_ratio", 2.0),
        (ERNIE_0_3B, "scale_qk_coeff", 0.5),
        (ERNIE_0_3B, "rope_3d", True),
        (ERNIE_0_3B, "use_rmsnorm", False),
        (ERNIE_0_3B, "hidden_act", "gelu"),
        (ERNIE_21B, "moe_gate_act", "sigmoid"),
        (ERNIE_21B, "moe_num_experts", [64, 64]),
        (ERNIE_21B, "moe_k", 65),
        (ERNIE_21B, "moe_layer_interval", 0),
        (ERNIE_21B, "moe_layer_end_index", -2),
        (ERNIE_21B, "moe_norm_min", 0),
        (ERNIE_21B, "moe_use_aux_free", "yes"),
        (QWEN3_30B, "use_sliding_window", True),
        (QWEN3_30B, "layer_types", ["full_attention", "sliding_attention"]),
        (QWEN3_30B, "layer_types", 3),
        (QWEN3_30B, "mlp_only_layers", [48]),
        (QWEN3_30B, "mlp_only_layers", 1),
        (QWEN3_30B, "num_experts_per_tok", 0),
        (QWEN3_30B, "norm_topk_prob", 1),
        (LLAMA_8B, "hidden_size", "4096"),
        (LLAMA_8B, "hidden_size", -1),
        (LLAMA_8B, "hidden_size", True),
        (LLAMA_8B, "num_hidden_layers", 0),
        (LLAMA_8B, "num_key_value_heads", 5),
        (LLAMA_8B, "head_dim", 7),
        (LLAMA_8B, "vocab_size", 1.5),
        (LLAMA_8B, "rms_norm_eps", float("nan")),
        (LLAMA_8B, "rope_theta", -1.0),
        (LLAMA_8B, "tie_word_embeddings", 1),
        (LLAMA_8B, "partial_rotary_factor", 0.5),
        (LLAMA_8B, "rope_scaling", "llama3"),
        (LLAMA_8B, "architectures", ["GPT2LMHeadModel"]),
        (LLAMA_8B, "architectures", None),
    ],
)
def test_bad_values_are_named(tmp_path: Path, base: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, base | {key: value})
    message = str(caught.value)
    assert "config.json" in message and f"{key} = {value!r}" in message and "\n" not in message


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_scaling.rope_type = 'longrope'"),
        ({"type": "dynamic", "factor": 2.0}, "rope_scaling.type = 'dynamic'"),
        ({"rope_type": ["yarn"]}, "rope_scaling.rope_type = ['yarn']"),
        ({"rope_type": "linear"}, "rope_scaling.factor = missing"),
        ({"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor = '4'"),
        ({"rope_type": "yarn", "factor": 4, "truncate": False}, "rope_scaling.truncate = False"),
        (without(LLAMA3, "low_freq_factor"), "rope_scaling.low_freq_factor = missing"),
    ],
)
def test_bad_rope_tables_are_named(tmp_path: Path, table: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, LLAMA_8B | {"rope_scaling": table})
    assert named in str(caught.value)


def test_rope_tables_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="differs from rope_parameters"):
        read(tmp_path, LLAMA_8B | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@pytest.mark.parametrize(
    "key", [*SIZES, "max_position_embeddings", "moe_k", "moe_num_experts", "moe_intermediate_size"]
)
def test_missing_sizes_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = missing"):
        read(tmp_path, without(ERNIE_21B, key))


def test_a_hidden_size_that_heads_cannot_share_needs_head_dim(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_dim = missing"):
        read(tmp_path, LLAMA_8B | {"num_attention_heads": 24})


@pytest.mark.parametrize(("text", "word"), [("{", "not valid JSON"), ("[]", "JSON object"), (None, "cannot be read")])
def test_a_bad_config_file_is_named(tmp_path: Path, text: str | None, word: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        read_model_shape(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_bad_weight_files_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read(tmp_path, LLAMA_8B)


def test_reading_a_shape_does_not_import_torch() -> None:
    code = "import sys, fastdeploy.config.model_shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
