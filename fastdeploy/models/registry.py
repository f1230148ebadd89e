"""Which file builds which architecture; a file is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.placement import Placement
from fastdeploy.models.decoder import Decoder

_FILES = {
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5_moe",
    "llama": "llama",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}


def build_model(shape: ModelShape, backend: AttentionBackend, place: Placement) -> Decoder:
    """The model of `shape.family`, without weights yet."""
    model: Decoder = import_module(f"fastdeploy.models.{_FILES[shape.family]}").build(shape, backend, place)
    return model
