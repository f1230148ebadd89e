"""What an attention backend is, and the table of those there are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.runner.step import StepContext


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Heads of one rank and the page size."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    page_tokens: int


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Which tokens a step computes, on the host: s sequences, their tokens one after the other.

    n_new_s: new tokens of each sequence; n_context_s: tokens with the new ones; page_table_sp: page ids, only the first
    ceil(context / page) of a row mean anything; slot_t: page * page_tokens + offset where each new token's k and v go.
    """

    n_new_s: NDArray[np.int32]
    n_context_s: NDArray[np.int32]
    page_table_sp: NDArray[np.int32]
    slot_t: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One new token of each of s sequences, in tensors that stay where they are while a CUDA graph is replayed.

    table_row_s: row of each sequence in `page_table` (int32 [rows, pages]); n_context_s: int32, tokens with the new
    one; slot_t: integers, where the new k and v go, below 0 where they are not to be kept.
    """

    page_table: Tensor
    table_row_s: Tensor
    n_context_s: Tensor
    slot_t: Tensor


class AttentionBackend(Protocol):
    """Causal attention of a step's new tokens over pages."""

    def allocate(self, n_pages: int) -> list[Tensor]:
        """Page tensors, one per layer, in this backend's own layout."""
        ...

    def view(self, pages_p2hTD: Tensor) -> Tensor:
        """One layer's pages [n, 2 (keys, values), kv heads, page tokens, D], which others share, in its own layout."""
        ...

    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        ...

    def prepare(self, batch: BatchLayout) -> Any:
        """Work out once per step what all layers need."""
        ...

    def attend(self, qkv_thd: Tensor, layer: int, step: StepContext) -> Tensor:
        """Rotate q and k of qkv [t, heads + 2 kv heads, D], store k and v, attend; returns [t, heads * D]."""
        ...


@runtime_checkable
class GraphAttentionBackend(AttentionBackend, Protocol):
    """A backend whose decode steps may be captured into a CUDA graph."""

    def prepare_decode(self, batch: DecodeBatch) -> Any:
        """What `prepare` gives, for a batch whose contents change between replays; nothing is copied or waited for."""
        ...


BACKENDS = {"torch": "torch_ref:TorchAttention", "triton": "triton:TritonAttention"}


def backend_for(device: torch.device) -> str:
    """The name of the fastest backend on that device."""
    return "triton" if device.type == "cuda" else "torch"


def make_attention(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The backend called `name`; a KeyError for an unknown name is our own bug."""
    module, cls = BACKENDS[name].split(":")
    backend: AttentionBackend = getattr(import_module(f"fastdeploy.layers.attention.{module}"), cls)(
        shape, dtype, device
    )
    return backend
