"""ERNIE-4.5-MoE: the first layers dense, then sparse ones.

Router in float32: softmax over all experts, selection by probability plus correction bias, weights renormalised without
the bias; one shared FFN of all shared experts' width, added unweighted (absent in the 300B).
"""

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
