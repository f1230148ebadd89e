"""Qwen3-MoE: Qwen3's attention; softmax router in the model's dtype, no bias, no shared expert."""

from __future__ import annotations

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.placement import Placement
from fastdeploy.models.decoder import Decoder, dense_block, sparse_block


def build(shape: ModelShape, backend: AttentionBackend, place: Placement) -> Decoder:
    """The model, without weights yet."""
    moe = shape.moe
    assert moe is not None
    blocks = [
        (sparse_block if i in moe.layers else dense_block)(shape, i, backend, place) for i in range(shape.n_layers)
    ]
    return Decoder(shape, blocks, place)
