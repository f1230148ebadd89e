"""Llama: grouped-query attention, half-split rotary pairs, gated FFN; biases only where the checkpoint says so."""

from __future__ import annotations

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.attention.layer import GroupedQueryAttention
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.placement import Placement
from fastdeploy.models.decoder import Decoder, ResidualBlock


def build(shape: ModelShape, backend: AttentionBackend, place: Placement) -> Decoder:
    """The model, without weights yet."""

    def layer(i: int) -> ResidualBlock:
        attention = GroupedQueryAttention(shape, i, backend, place)
        ffn = GatedMLP(shape.hidden_size, shape.ffn_width, place, bias=shape.mlp_bias)
        return ResidualBlock(shape, attention, ffn, place)

    return Decoder(shape, [layer(i) for i in range(shape.n_layers)], place)
