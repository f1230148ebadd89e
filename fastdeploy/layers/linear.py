"""A linear layer that may merge several checkpoint matrices, and loads them itself.

On a CPU in float32 the weight is packed once into oneDNN's blocked form, which is faster than the
plain BLAS call for the few rows of a decode step. The packed copy replaces the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource

RowOrder = Callable[[Tensor], Tensor]  # [rows, in] -> the same rows in another order

# Rows for which oneDNN chooses the blocked layout; the layout serves every other row count as well.
_PACK_ROWS = 16


def packed_matmul_available(place: Placement) -> bool:
    """Whether this build of torch can multiply with oneDNN-packed weights there."""
    return place.device.type == "cpu" and place.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class Linear(nn.Module):
    """`y_tO = x_tI @ W.T + b`, W stacked from parts of `out_sizes` rows each.

    Weight and bias have the dtype and device of `place`. There is no weight before `load` or `set_weight`.
    """

    def __init__(self, in_size: int, out_sizes: Sequence[int], place: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.in_size = in_size
        self.out_sizes = tuple(out_sizes)
        self.place = place
        self.weight: Tensor | None = None
        self.packed: Tensor | None = None
        self.bias = torch.empty(sum(out_sizes), dtype=place.dtype, device=place.device) if bias else None
        self._pack = packed_matmul_available(place)

    def forward(self, x_tI: Tensor) -> Tensor:
        if self.packed is not None:
            # oneDNN answers garbage shapes for zero rows; an empty batch is a legal step of an idle rank.
            if x_tI.shape[0] == 0:
                return x_tI.new_empty(0, sum(self.out_sizes))
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x_tI, self.packed, self.bias, "none", [], "")
            return packed
        assert self.weight is not None, "forward before load"
        return functional.linear(x_tI, self.weight, self.bias)

    def load(self, weights: WeightSource, names: Sequence[str], row_orders: Sequence[RowOrder | None] = ()) -> None:
        """Fill from the canonical tensors `NAME.weight` (and `NAME.bias`), one per part.

        `row_orders` may reorder the rows of each part, biases included (rotary pairs are stored in one order here).
        Raises CheckpointError when a tensor is missing or has another shape.
        """
        orders = list(row_orders) or [None] * len(names)
        weight_OI = torch.empty(sum(self.out_sizes), self.in_size, dtype=self.place.dtype, device=self.place.device)
        row = 0
        for name, size, order in zip(names, self.out_sizes, orders, strict=True):
            part_OI = weights.require(f"{name}.weight", (size, self.in_size)).read()
            weight_OI[row : row + size].copy_(order(part_OI) if order else part_OI)
            if self.bias is not None:
                part_O1 = weights.require(f"{name}.bias", (size,)).read()[:, None]
                self.bias[row : row + size].copy_((order(part_O1) if order else part_O1)[:, 0])
            row += size
        self.set_weight(weight_OI)

    def set_weight(self, weight_OI: Tensor) -> None:
        """Take a finished weight [out, in] of the layer's placement."""
        if self._pack:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACK_ROWS)
        else:
            self.weight = weight_OI

    def n_bytes(self) -> int:
        """Bytes held by weight and bias."""
        n_weight = sum(self.out_sizes) * self.in_size
        return (n_weight + (sum(self.out_sizes) if self.bias is not None else 0)) * self.place.dtype.itemsize
