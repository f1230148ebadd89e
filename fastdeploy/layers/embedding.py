"""Token embedding and the output head, which may share one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.layers.linear import Linear
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


class Embedding(nn.Module):
    """Rows of a table [V, H]. The table stays in the checkpoint's dtype; the rows looked up are cast."""

    def __init__(self, n_rows: int, size: int, place: Placement) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.size = size
        self.place = place
        self.table_VH: Tensor | None = None

    def forward(self, ids_t: Tensor) -> Tensor:
        assert self.table_VH is not None, "forward before load"
        return functional.embedding(ids_t, self.table_VH).to(self.place.dtype)

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.weight`, [V, H]."""
        stored_VH = weights.require(f"{name}.weight", (self.n_rows, self.size)).read()
        # On a CPU the table is only looked up, so half-precision rows stay small; a GPU also multiplies with it.
        dtype = (
            stored_VH.dtype if self.place.device.type == "cpu" and stored_VH.dtype.itemsize == 2 else self.place.dtype
        )
        self.table_VH = torch.empty(stored_VH.shape, dtype=dtype, device=self.place.device)
        self.table_VH.copy_(stored_VH)

    def n_bytes(self) -> int:
        """Bytes of the table."""
        return 0 if self.table_VH is None else self.table_VH.nbytes


class OutputHead(nn.Module):
    """Hidden states to float32 logits; `tied` shares the embedding's matrix where it can be multiplied with."""

    def __init__(self, n_rows: int, size: int, place: Placement) -> None:
        super().__init__()
        self.linear = Linear(size, (n_rows,), place)

    def forward(self, x_rH: Tensor) -> Tensor:
        return self.linear(x_rH).float()  # type: ignore[no-any-return]

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.weight`, [V, H]."""
        self.linear.load(weights, (name,))

    def tie(self, embedding: Embedding) -> None:
        """Use the embedding's matrix; on a CPU as a packed copy."""
        assert embedding.table_VH is not None, "tie before load"
        self.linear.set_weight(embedding.table_VH.to(self.linear.place.dtype))
