"""Weights of one tensor rank: a source that reads only its share of the checkpoint.

Layers ask for tensors of their local sizes; what stands between them and the checkpoint knows the whole sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastdeploy.kernels.weight_formats import FP8_BLOCK
from fastdeploy.models.weights import StoredTensor, WeightSource


@dataclass(frozen=True, slots=True)
class Cut:
    """A run of an axis of `n_total`, from `first` on. Axis 0 cuts the rows of matrices and biases, 1 only columns."""

    axis: int
    first: int
    n_total: int


@dataclass(frozen=True, slots=True)
class _CutTensor:
    whole: StoredTensor
    axis: int
    first: int
    n: int

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        if self.axis == 0:
            return self.whole.read(rows=self._within(rows), columns=columns)
        return self.whole.read(rows=rows, columns=self._within(columns))

    def as_fp8(self) -> tuple[StoredTensor, StoredTensor] | None:
        whole = self.whole.as_fp8()
        if whole is None or self.first % FP8_BLOCK or self.n % FP8_BLOCK:
            return None
        codes, scales = whole
        first, n = self.first // FP8_BLOCK, self.n // FP8_BLOCK
        return replace(self, whole=codes), _CutTensor(scales, self.axis, first, n)

    def _within(self, part: slice | None) -> slice:
        """A slice of this share as one of the whole."""
        start, stop, _ = (part or slice(None)).indices(self.n)
        return slice(self.first + start, self.first + stop)


class CutWeights:
    """`source` with the tensors `*.PROJECTION.*` of `cuts` narrowed; others pass whole."""

    def __init__(self, source: WeightSource, cuts: Mapping[str, Cut]) -> None:
        self._source = source
        self._cuts = cuts

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The share of the tensor `name` that has `shape`."""
        cut = self._cuts.get(name.rsplit(".", 2)[-2])
        if cut is None or cut.axis >= len(shape):
            return self._source.require(name, shape)
        whole = (*shape[: cut.axis], cut.n_total, *shape[cut.axis + 1 :])
        return _CutTensor(self._source.require(name, whole), cut.axis, cut.first, shape[cut.axis])


_FFN_AXES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


class FFNShare:
    """`source` for one of `n_parts` ranks that share the width of gated FFNs of any width equally."""

    def __init__(self, source: WeightSource, n_parts: int, part: int) -> None:
        self._source = source
        self._n_parts = n_parts
        self._part = part

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The share of the tensor `name` that has `shape`."""
        projection = name.rsplit(".", 2)[-2]
        axis = _FFN_AXES.get(projection)
        if self._n_parts == 1 or axis is None or axis >= len(shape):
            return self._source.require(name, shape)
        width = shape[axis]
        cut = Cut(axis, self._part * width, self._n_parts * width)
        return CutWeights(self._source, {projection: cut}).require(name, shape)
