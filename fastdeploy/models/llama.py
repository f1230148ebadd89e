"""Llama: grouped-query attention, half-split rotary pairs, gated FFN; biases only where the checkpoint says so."""

from __future__ import annotations

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.placement import Placement
from fastdeploy.models.decoder import Decoder, dense_block


def build(shape: ModelShape, backend: AttentionBackend, place: Placement) -> Decoder:
    """The model, without weights yet."""
    return Decoder(shape, [dense_block(shape, i, backend, place) for i in range(shape.n_layers)], place)
