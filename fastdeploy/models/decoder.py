"""What all decoder-only models here share: the pre-norm residual block, and the stack around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastdeploy.config.schema import ModelShape
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.attention.layer import GroupedQueryAttention
from fastdeploy.layers.embedding import Embedding, OutputHead
from fastdeploy.layers.mlp import DenseFFN
from fastdeploy.layers.moe.layer import SparseMoE
from fastdeploy.layers.norm import RMSNorm
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource
from fastdeploy.runner.step import StepContext

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs


@runtime_checkable
class _Weighty(Protocol):
    """A layer that holds weights itself."""

    def n_bytes(self) -> int:
        """Bytes of its weights."""
        ...


class ResidualBlock(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x)), both norms RMSNorm before the sub-layer."""

    def __init__(
        self, shape: ModelShape, attention: GroupedQueryAttention, ffn: DenseFFN | SparseMoE, place: Placement
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps, place)
        self.attention = attention
        self.ffn_norm = RMSNorm(shape.hidden_size, shape.norm_eps, place)
        self.ffn = ffn

    def forward(
        self, y_tH: Tensor | SlotOutputs, x_tH: Tensor | None, step: StepContext
    ) -> tuple[Tensor | SlotOutputs, Tensor]:
        """From (what the sub-layer before gave, what it is to be added to) to the same of this block.

        The addition is left to the next norm, which is one pass with it on a GPU; there also that of a row's experts.
        None is zero.
        """
        normed_tH, x_tH = self.attention_norm.add(y_tH, x_tH)
        attended_tH: Tensor = self.attention(normed_tH, step)
        ffn = self.ffn
        if not isinstance(ffn, SparseMoE) or (experts := ffn.whole) is None:
            normed_tH, x_tH = self.ffn_norm.add(attended_tH, x_tH)
            return ffn(normed_tH, step), x_tH
        rows8 = None
        if experts.takes_fp8_rows:
            normed_tH, x_tH, rows8 = self.ffn_norm.add_fp8(attended_tH, x_tH)
        else:
            normed_tH, x_tH = self.ffn_norm.add(attended_tH, x_tH)
        return ffn.slot_outputs(normed_tH, experts, rows8), x_tH

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from the tensors under `NAME`."""
        self.attention_norm.load(weights, f"{name}.input_layernorm")
        self.attention.load(weights, f"{name}.self_attn")
        self.ffn_norm.load(weights, f"{name}.post_attention_layernorm")
        self.ffn.load(weights, f"{name}.mlp")


def dense_block(shape: ModelShape, layer: int, backend: AttentionBackend, place: Placement) -> ResidualBlock:
    """A block whose FFN every token passes whole."""
    attention = GroupedQueryAttention(shape, layer, backend, place)
    ffn = DenseFFN(shape.hidden_size, shape.ffn_width, place, bias=shape.mlp_bias)
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
        y_tH: Tensor | SlotOutputs = self.embed(ids_t)
        x_tH: Tensor | None = None
        for layer in self.layers:
            y_tH, x_tH = layer(y_tH, x_tH, step)
        if not isinstance(y_tH, Tensor):
            y_tH = y_tH.summed()
        return y_tH if x_tH is None else x_tH + y_tH

    def logits(self, x_rH: Tensor) -> Tensor:
        """Logits [r, V], in the dtype of the rows, of those chosen from what `forward` returned."""
        logits_rV: Tensor = self.head(self.norm(x_rH))
        return logits_rV

    def n_bytes(self) -> int:
        """Bytes of all weights."""
        parts = (module for child in self.children() for module in child.modules())
        return sum(part.n_bytes() for part in parts if isinstance(part, _Weighty))

    def sparse_layers(self) -> list[SparseMoE]:
        """The layers with experts, in order."""
        return [module for module in self.modules() if isinstance(module, SparseMoE)]

    def count_expert_loads(self) -> None:
        """From now on count the rows that go to each expert of this rank."""
        for layer in self.sparse_layers():
            layer.count_loads()

    def expert_loads(self) -> Tensor:
        """int64 [sparse layer, local expert]: rows of all ranks that went to each expert here since counting began."""
        loads = [layer.load_e[:-1] for layer in self.sparse_layers() if layer.load_e is not None]
        return torch.stack(loads) if loads else torch.zeros(0, 0, dtype=torch.int64)

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
