"""Grouped-query attention: projections and head norms; the attention itself is the backend's."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.norm import RMSNorm
from fastdeploy.layers.placement import Placement
from fastdeploy.layers.rotary import pairs_side_by_side
from fastdeploy.models.weights import WeightSource
from fastdeploy.runner.step import StepContext


class GroupedQueryAttention(nn.Module):
    """Attention with A query heads over K key/value heads of size D (Ainslie et al., 2023), rotary positions."""

    def __init__(self, shape: ModelShape, layer: int, backend: AttentionBackend, place: Placement) -> None:
        super().__init__()
        self.shape = shape
        self.layer = layer
        self.backend = backend
        q_size, kv_size = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        bias = shape.attention_bias
        self.qkv = Linear(shape.hidden_size, (q_size, kv_size, kv_size), place, bias=bias)
        self.out = Linear(q_size, (shape.hidden_size,), place, bias=bias)
        self.q_norm = self.k_norm = None
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps, place)
            self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps, place)

    def forward(self, x_tH: Tensor, step: StepContext) -> Tensor:
        n_heads, n_qk = self.shape.n_heads, self.shape.n_heads + self.shape.n_kv_heads
        qkv_thd = self.qkv(x_tH).unflatten(-1, (-1, self.shape.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            qkv_thd[:, :n_heads] = self.q_norm(qkv_thd[:, :n_heads])
            qkv_thd[:, n_heads:n_qk] = self.k_norm(qkv_thd[:, n_heads:n_qk])
        out_tH: Tensor = self.out(self.backend.attend(qkv_thd, self.layer, step))
        return out_tH

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.{q,k,v,o}_proj` and `NAME.{q,k}_norm`; half-split rotary pairs become neighbours."""
        order = None
        if self.shape.rope.style == "half_split":
            order = partial(pairs_side_by_side, head_dim=self.shape.head_dim)
        self.qkv.load(weights, [f"{name}.{part}_proj" for part in "qkv"], (order, order, None))
        self.out.load(weights, (f"{name}.o_proj",))
        for norm, part in ((self.q_norm, "q_norm"), (self.k_norm, "k_norm")):
            if norm is not None:
                norm.load(weights, f"{name}.{part}")
                if order is not None:
                    norm.weight.copy_(order(norm.weight[:, None].clone())[:, 0])
