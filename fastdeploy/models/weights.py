"""Where layers get their weights from: a checkpoint, or random numbers of the right shapes."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StoredTensor(Protocol):
    """One tensor that can be read, whole or in part."""

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or a slice of its first and second axis, on the CPU."""
        ...

    def as_fp8(self) -> tuple[StoredTensor, StoredTensor] | None:
        """Its float8_e4m3fn codes [O, I] and scales [O / 128, I / 128], where it consists of whole such blocks."""
        ...


class WeightSource(Protocol):
    """What `load` methods take."""

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The canonical tensor `name`; raises CheckpointError when it is missing or not of `shape`."""
        ...


class Noted:
    """A source that remembers what was asked of it, so that what nobody asked for can be named."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.names: set[str] = set()

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The same tensor from the source behind."""
        self.names.add(name)
        return self._source.require(name, shape)


@dataclass(frozen=True, slots=True)
class _RandomTensor:
    shape: tuple[int, ...]
    scale: float
    seed: int

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if len(self.shape) == 1:
            whole = torch.ones(self.shape) if self.scale == 0 else torch.zeros(self.shape)
        else:
            whole = torch.randn(self.shape, generator=generator) * self.scale
        return whole[rows or slice(None)] if columns is None else whole[rows or slice(None), columns]

    def as_fp8(self) -> None:
        return None


class RandomWeights:
    """`--load-choices dummy`: normal(0, 0.02) matrices, norms of one, biases of zero; same name and seed, same numbers.

    Random rather than constant: with constant weights every token picks the same experts, and any engine looks faster
    than it is.
    """

    def __init__(self, n_layers: int, seed: int) -> None:
        self._out_scale = 1 / math.sqrt(2 * n_layers)
        self._seed = seed

    def require(self, name: str, shape: tuple[int, ...]) -> _RandomTensor:
        """Random numbers for the tensor `name`."""
        scale = 0.02 * (self._out_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        if len(shape) == 1 and name.endswith("norm.weight"):
            scale = 0.0
        return _RandomTensor(shape, scale, zlib.crc32(name.encode(), self._seed))
