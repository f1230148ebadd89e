"""ERNIE-4.5-MoE: the first layers dense, then sparse ones.

Router in float32: softmax over all experts, selection by probability plus correction bias, weights renormalised without
the bias; one shared FFN of all shared experts' width, added unweighted (absent in the 300B).
"""

from __future__ import annotations

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.attention.layer import GroupedQueryAttention
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.layer import SparseMoE
from fastdeploy.layers.placement import Placement
from fastdeploy.models.decoder import Decoder, ResidualBlock


def build(shape: ModelShape, backend: AttentionBackend, place: Placement) -> Decoder:
    """The model, without weights yet."""
    moe = shape.moe
    assert moe is not None

    def layer(i: int) -> ResidualBlock:
        attention = GroupedQueryAttention(shape, i, backend, place)
        if i in moe.layers:
            return ResidualBlock(shape, attention, SparseMoE(shape.hidden_size, moe, place), place)
        ffn = GatedMLP(shape.hidden_size, shape.ffn_width, place)
        return ResidualBlock(shape, attention, ffn, place)

    return Decoder(shape, [layer(i) for i in range(shape.n_layers)], place)
