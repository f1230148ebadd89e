"""Where layers get their weights from: a checkpoint, or numbers made up in its place (`random_weights.py`)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class StoredTensor(Protocol):
    """One tensor that can be read, whole or in part."""

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or a slice of its first and second axis: of a checkpoint on the CPU."""
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
