"""A linear layer that may merge several checkpoint matrices, and loads them itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdeploy.layers.matmul import Matmul, load_matmul, make_matmul, stored_dtype
from fastdeploy.layers.placement import Placement
from fastdeploy.models.fp8_blocks import read_blocks
from fastdeploy.models.weights import StoredTensor, WeightSource

RowOrder = Callable[[Tensor], Tensor]  # [rows, in] -> the same rows in another order


def packed_matmul_available(place: Placement) -> bool:
    """Whether weights there are packed once, so that a step of few rows multiplies with a wide matrix at full speed."""
    if place.quantization is not None:
        return False
    return place.device.type == "cpu" and place.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class Linear(nn.Module):
    """`y_tO = x_tI @ W.T + b`, W stacked from parts of `out_sizes` rows each.

    The bias has the dtype and device of `place`; the weight is held as `layers/matmul.py` finds best. There is no
    weight before `load` or `set_weight`.
    """

    def __init__(self, in_size: int, out_sizes: Sequence[int], place: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.in_size = in_size
        self.out_sizes = tuple(out_sizes)
        self.place = place
        self.matmul: Matmul | None = None
        self.bias = torch.empty(sum(out_sizes), dtype=place.dtype, device=place.device) if bias else None

    def forward(self, x_tI: Tensor) -> Tensor:
        assert self.matmul is not None, "forward before load"
        return self.matmul(x_tI, self.bias)

    def load(self, weights: WeightSource, names: Sequence[str], row_orders: Sequence[RowOrder | None] = ()) -> None:
        """Fill from the canonical tensors `NAME.weight` (and `NAME.bias`), one per part.

        `row_orders` may reorder the rows of each part, biases included (rotary pairs are stored in one order here).
        Raises CheckpointError when a tensor is missing or has another shape.
        """
        orders = list(row_orders) or [None] * len(names)
        if self.bias is not None:
            parts = zip(self.bias.split(self.out_sizes), names, orders, strict=True)
            for part_O, name, order in parts:
                stored_O1 = weights.require(f"{name}.bias", tuple(part_O.shape)).read()[:, None]
                part_O.copy_((order(stored_O1) if order else stored_O1)[:, 0])
        self.matmul = load_matmul(
            lambda: self._read(weights, names, orders),
            sum(self.out_sizes),
            self.place,
            lambda: read_blocks(self._parts(weights, names), orders),
        )

    def _parts(self, weights: WeightSource, names: Sequence[str]) -> list[StoredTensor]:
        sizes = zip(names, self.out_sizes, strict=True)
        return [weights.require(f"{name}.weight", (size, self.in_size)) for name, size in sizes]

    def _read(self, weights: WeightSource, names: Sequence[str], orders: Sequence[RowOrder | None]) -> Tensor:
        """The whole weight [out, in]."""
        parts = [part.read() for part in self._parts(weights, names)]
        dtype = stored_dtype({part_OI.dtype for part_OI in parts}, self.place)
        weight_OI = torch.empty(sum(self.out_sizes), self.in_size, dtype=dtype, device=self.place.device)
        for rows_OI, order in zip(weight_OI.split(self.out_sizes), orders, strict=True):
            part_OI = parts.pop(0)
            rows_OI.copy_(order(part_OI) if order else part_OI)
        return weight_OI

    def set_weight(self, weight_OI: Tensor) -> None:
        """Take a finished weight [out, in] on the layer's device; 16-bit weights stay so where they can."""
        self.matmul = make_matmul(weight_OI, self.place)

    def n_bytes(self) -> int:
        """Bytes held by weight and bias."""
        n_weight = 0 if self.matmul is None else self.matmul.n_bytes()
        return n_weight + (0 if self.bias is None else self.bias.nbytes)
