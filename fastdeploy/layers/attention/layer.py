"""Grouped-query attention: projections and head norms; the attention itself is the backend's."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastdeploy.config.schema import ModelShape
from fastdeploy.distributed.sharding import Cut, CutWeights
from fastdeploy.distributed.topology import local_kv_heads
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.norm import RMSNorm
from fastdeploy.layers.placement import Placement
from fastdeploy.layers.rotary import pairs_side_by_side
from fastdeploy.models.weights import WeightSource
from fastdeploy.runner.step import StepContext


class GroupedQueryAttention(nn.Module):
    """Attention with A query heads over K key/value heads of size D (Ainslie et al., 2023), rotary positions.

    Tensor ranks share the heads; `n_heads` and `n_kv_heads` are those of this rank.
    """

    def __init__(self, shape: ModelShape, layer: int, backend: AttentionBackend, place: Placement) -> None:
        super().__init__()
        self.shape = shape
        self.layer = layer
        self.backend = backend
        self.peers = place.peers
        where = place.peers.where
        self.n_heads = shape.n_heads // where.n_tensor
        self.first_kv_head, self.n_kv_heads = local_kv_heads(shape.n_kv_heads, where)
        q_size, kv_size = self.n_heads * shape.head_dim, self.n_kv_heads * shape.head_dim
        bias = shape.attention_bias
        self.qkv = Linear(shape.hidden_size, (q_size, kv_size, kv_size), place, bias=bias)
        # Only one rank adds the bias of what is summed up.
        self.out = Linear(q_size, (shape.hidden_size,), place, bias=bias and where.tensor_rank == 0)
        self.q_norm = self.k_norm = None
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps, place)
            self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps, place)

    def forward(self, x_tH: Tensor, step: StepContext) -> Tensor:
        n_heads, n_qk = self.n_heads, self.n_heads + self.n_kv_heads
        qkv_thd = self.qkv(x_tH).unflatten(-1, (-1, self.shape.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm.in_place(qkv_thd[:, :n_heads])
            self.k_norm.in_place(qkv_thd[:, n_heads:n_qk])
        return self.peers.all_reduce_sum(self.out(self.backend.attend(qkv_thd, self.layer, step)))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from this rank's heads of `NAME.{q,k,v,o}_proj`, and from `NAME.{q,k}_norm`.

        Half-split rotary pairs become neighbours.
        """
        order = None
        if self.shape.rope.style == "half_split":
            order = partial(pairs_side_by_side, head_dim=self.shape.head_dim)
        mine = self._heads_of(weights)
        self.qkv.load(mine, [f"{name}.{part}_proj" for part in "qkv"], (order, order, None))
        self.out.load(mine, (f"{name}.o_proj",))
        for norm, part in ((self.q_norm, "q_norm"), (self.k_norm, "k_norm")):
            if norm is not None:
                norm.load(weights, f"{name}.{part}")
                if order is not None:
                    norm.weight.copy_(order(norm.weight[:, None].clone())[:, 0])

    def _heads_of(self, weights: WeightSource) -> WeightSource:
        shape, where = self.shape, self.peers.where
        if where.n_tensor == 1:
            return weights
        first_q, n_q = where.tensor_rank * self.n_heads * shape.head_dim, shape.n_heads * shape.head_dim
        kv_rows = Cut(0, self.first_kv_head * shape.head_dim, shape.n_kv_heads * shape.head_dim)
        return CutWeights(
            weights,
            {"q_proj": Cut(0, first_q, n_q), "k_proj": kv_rows, "v_proj": kv_rows, "o_proj": Cut(1, first_q, n_q)},
        )
