"""The data type, sampling defaults and end tokens that a checkpoint's json files name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.config.model_shape import checkpoint_dtype, read_eos_token_ids, read_generation_defaults
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(120)

TinyModel = Callable[..., Path]


def write_json(folder: Path, name: str, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.float16"}, "float16"),
    ],
)
def test_dtype_by_config(tmp_path: Path, keys: dict[str, str], dtype: str) -> None:
    assert checkpoint_dtype(write_json(tmp_path, "config.json", keys)) == dtype


def test_dtype_by_the_embedding(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tiny_model("llama", dtype="bfloat16") / "model.safetensors")
    assert checkpoint_dtype(write_json(tmp_path, "config.json", {})) == "bfloat16"


@pytest.mark.parametrize("keys", [{}, {"torch_dtype": "int8"}, {"dtype": 3}])
def test_a_bad_dtype_is_named(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: torch_dtype = "):
        checkpoint_dtype(write_json(tmp_path, "config.json", keys))


def test_generation_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}
    content = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "top_k": None, "repetition_penalty": 1.1, "pad": 0}
    write_json(tmp_path, "generation_config.json", content)
    assert read_generation_defaults(tmp_path) == {"top_p": 0.8, "temperature": 0.8, "repetition_penalty": 1.1}


@pytest.mark.parametrize("content", [{"top_p": 7.0}, {"temperature": "hot"}, "{", [1]])
def test_bad_generation_defaults_are_named(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path, "generation_config.json", content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [7, 8]}, None, (7, 8)),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, (3, 4, 2)),
        ({"eos_token_id": 2}, {"eos_token_id": 2}, (2,)),
        ({}, {"eos_token_id": None}, ()),
    ],
)
def test_eos_token_ids(tmp_path: Path, config: Any, generation: Any, ids: tuple[int, ...]) -> None:
    write_json(tmp_path, "config.json", config)
    if generation is not None:
        write_json(tmp_path, "generation_config.json", generation)
    assert read_eos_token_ids(tmp_path) == ids


@pytest.mark.parametrize("value", ["</s>", [1, -1], True])
def test_bad_eos_token_ids_are_named(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path, "config.json", {"eos_token_id": value})
    with pytest.raises(ConfigError, match="eos_token_id"):
        read_eos_token_ids(tmp_path)
