"""Token embedding and the output head, which may share one matrix; tensor ranks hold runs of the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.distributed.sharding import Cut, CutWeights
from fastdeploy.distributed.topology import run_of
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


def _local_rows(n_rows: int, place: Placement) -> tuple[int, int]:
    """(first, number) of the rows of this rank."""
    where = place.peers.where
    return run_of(n_rows, where.n_tensor, where.tensor_rank)


class Embedding(nn.Module):
    """Rows of a table [V, H]. The table stays in the checkpoint's dtype; the rows looked up are cast."""

    def __init__(self, n_rows: int, size: int, place: Placement) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.size = size
        self.place = place
        self.first_row, self.n_local = _local_rows(n_rows, place)
        self.table_VH: Tensor | None = None

    def forward(self, ids_t: Tensor) -> Tensor:
        assert self.table_VH is not None, "forward before load"
        if self.n_local == self.n_rows:
            return functional.embedding(ids_t, self.table_VH).to(self.place.dtype)
        local_t = ids_t - self.first_row
        elsewhere_t = (local_t < 0) | (local_t >= self.n_local)
        x_tH = functional.embedding(local_t.masked_fill_(elsewhere_t, 0), self.table_VH).to(self.place.dtype)
        return self.place.peers.all_reduce_sum(x_tH.masked_fill(elsewhere_t[:, None], 0))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from this rank's rows of `NAME.weight`, [V, H]."""
        mine = CutWeights(weights, {name.rpartition(".")[2]: Cut(0, self.first_row, self.n_rows)})
        self.table_VH = self.place.weights.keep(lambda: self._read(mine, name))

    def _read(self, mine: WeightSource, name: str) -> Tensor:
        """The table in memory of its own."""
        stored_VH = mine.require(f"{name}.weight", (self.n_local, self.size)).read()
        # On a CPU the table is only looked up, so half-precision rows stay small; a GPU also multiplies with it.
        dtype = (
            stored_VH.dtype if self.place.device.type == "cpu" and stored_VH.dtype.itemsize == 2 else self.place.dtype
        )
        table_VH = torch.empty(stored_VH.shape, dtype=dtype, device=self.place.device)
        return table_VH.copy_(stored_VH)

    def n_bytes(self) -> int:
        """Bytes of the table."""
        return 0 if self.table_VH is None else self.table_VH.nbytes


class OutputHead(nn.Module):
    """Hidden states to logits, in their dtype; `tied` shares the embedding's matrix where it can be multiplied with.

    Every tensor rank gets the logits of the whole vocabulary, so that all sample the same token.
    """

    def __init__(self, n_rows: int, size: int, place: Placement) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.place = place
        self.first_row, n_local = _local_rows(n_rows, place)
        self.linear = Linear(size, (n_local,), replace(place, quantization=None))  # logits decide between close tokens

    def forward(self, x_rH: Tensor) -> Tensor:
        return self.place.peers.gather_columns(self.linear(x_rH), self.n_rows)

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from this rank's rows of `NAME.weight`, [V, H]."""
        mine = CutWeights(weights, {name.rpartition(".")[2]: Cut(0, self.first_row, self.n_rows)})
        self.linear.load(mine, (name,))

    def tie(self, embedding: Embedding) -> None:
        """Use the embedding's matrix; on a CPU as a packed copy."""
        assert embedding.table_VH is not None, "tie before load"
        self.linear.set_weight(embedding.table_VH)
