"""What all decoder-only models here share: the pre-norm residual block, and the stack around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.attention.layer import GroupedQueryAttention
from fastdeploy.layers.embedding import Embedding, OutputHead
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.layer import SparseMoE
from fastdeploy.layers.norm import RMSNorm
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource
from fastdeploy.runner.step import StepContext


class ResidualBlock(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x)), both norms RMSNorm before the sub-layer."""

    def __init__(
        self, shape: ModelShape, attention: GroupedQueryAttention, ffn: GatedMLP | SparseMoE, place: Placement
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps, place)
        self.attention = attention
        self.ffn_norm = RMSNorm(shape.hidden_size, shape.norm_eps, place)
        self.ffn = ffn

    def forward(self, x_tH: Tensor, step: StepContext) -> Tensor:
        x_tH = x_tH + self.attention(self.attention_norm(x_tH), step)
        return x_tH + self.ffn(self.ffn_norm(x_tH))  # type: ignore[no-any-return]

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from the tensors under `NAME`."""
        self.attention_norm.load(weights, f"{name}.input_layernorm")
        self.attention.load(weights, f"{name}.self_attn")
        self.ffn_norm.load(weights, f"{name}.post_attention_layernorm")
        self.ffn.load(weights, f"{name}.mlp")


def dense_block(shape: ModelShape, layer: int, backend: AttentionBackend, place: Placement) -> ResidualBlock:
    """A block whose FFN every token passes whole."""
    attention = GroupedQueryAttention(shape, layer, backend, place)
    ffn = GatedMLP(shape.hidden_size, shape.ffn_width, place, bias=shape.mlp_bias)
    return ResidualBlock(shape, attention, ffn, place)


def sparse_block(shape: ModelShape, layer: int, backend: AttentionBackend, place: Placement) -> ResidualBlock:
    """A block with a router and experts."""
    assert shape.moe is not None, "a model without experts has no sparse blocks"
    attention = GroupedQueryAttention(shape, layer, backend, place)
    return ResidualBlock(shape, attention, SparseMoE(shape.hidden_size, shape.moe, place), place)


class Decoder(nn.Module):
    """Token ids to logits over a stack of `layers`, which each model file defines."""

    def __init__(self, shape: ModelShape, layers: Sequence[ResidualBlock], place: Placement) -> None:
        super().__init__()
        self.shape = shape
        sizes = (shape.vocab_size, shape.hidden_size)
        self.embed = Embedding(*sizes, place)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps, place)
        self.head = OutputHead(*sizes, place)

    def forward(self, ids_t: Tensor, step: StepContext) -> Tensor:
        """Final hidden states [t, H] of tokens ids [t]."""
        x_tH: Tensor = self.embed(ids_t)
        for layer in self.layers:
            x_tH = layer(x_tH, step)
        return x_tH

    def logits(self, x_rH: Tensor) -> Tensor:
        """float32 logits [r, V] of the rows chosen from what `forward` returned."""
        logits_rV: Tensor = self.head(self.norm(x_rH))
        return logits_rV

    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(module.n_bytes() for module in self.modules() if isinstance(module, (Embedding, Linear)))

    def load(self, weights: WeightSource, on_layer: Callable[[int], None] = lambda _: None) -> None:
        """Fill all weights; `on_layer(n)` is called when n layers are done."""
        self.embed.load(weights, "model.embed_tokens")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, ResidualBlock)
            layer.load(weights, f"model.layers.{i}")
            on_layer(i + 1)
        self.norm.load(weights, "model.norm")
        if self.shape.tied_embeddings:
            self.head.tie(self.embed)
        else:
            self.head.load(weights, "lm_head")
