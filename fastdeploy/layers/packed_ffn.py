"""Gated feed-forward networks, one or many experts, computed by our own CPU kernel in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from fastdeploy.kernels.cpu.library import kernels_for
from fastdeploy.kernels.cpu.panels import PanelFFN, to_panels
from fastdeploy.layers.matmul import stored_dtype
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


def packed_ffn_available(place: Placement) -> bool:
    """Whether `PackedFFN` can compute there."""
    return place.quantization is None and kernels_for(place.device, place.dtype) is not None


class PackedFFN(nn.Module):
    """`n` gated FFNs without biases, `down(silu(gate(x)) * up(x))` (Shazeer, 2020), weights held as they are stored."""

    def __init__(self, n: int, hidden_size: int, width: int, place: Placement) -> None:
        super().__init__()
        self.n = n
        self.hidden_size = hidden_size
        self.width = width
        self.place = place
        self.ffn: PanelFFN | None = None

    def forward(self, x_tH: Tensor, routing: Routing | None = None) -> Tensor:
        """[t, H]: sum over a row's FFNs of weight times FFN, or the one FFN there is; ids from `n` on count nothing."""
        assert self.ffn is not None, "forward before load"
        if routing is None:
            return self.ffn(x_tH)
        return self.ffn(x_tH, routing.expert_tk, routing.weight_tk)

    def load(self, weights: WeightSource, name: str, first_expert: int = 0) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`, J from `first_expert` on."""
        self.load_each(weights, [f"{name}.{first_expert + i}" for i in range(self.n)])

    def load_each(self, weights: WeightSource, names: Sequence[str]) -> None:
        """Fill from `NAME.{gate,up,down}_proj.weight`, a name for each FFN.

        Raises CheckpointError when a tensor is missing or has another shape.
        """
        kernels = kernels_for(self.place.device, self.place.dtype)
        assert kernels is not None, "PackedFFN where it is not available"
        read = cache(lambda: self._read(weights, names))  # once, and only where it has to be
        keep = self.place.weights.keep
        gate, up, down = (keep(partial(_panels_of, read, part)) for part in ("gate", "up", "down"))
        self.ffn = PanelFFN(kernels, gate, up, down)

    def _read(self, weights: WeightSource, names: Sequence[str]) -> dict[str, Tensor]:
        """The weights of all FFNs one above the other, [n, M, H] or [n, H, M], in one dtype."""
        up_shape, down_shape = (self.width, self.hidden_size), (self.hidden_size, self.width)
        shapes = {"gate": up_shape, "up": up_shape, "down": down_shape}
        parts = {
            part: [weights.require(f"{name}.{part}_proj.weight", shape).read() for name in names]
            for part, shape in shapes.items()
        }
        dtype = stored_dtype({tensor.dtype for tensors in parts.values() for tensor in tensors}, self.place)
        return {part: torch.stack([tensor.to(dtype) for tensor in tensors]) for part, tensors in parts.items()}

    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return 0 if self.ffn is None else self.ffn.n_bytes()


def _panels_of(read: Callable[[], dict[str, Tensor]], part: str) -> Tensor:
    return to_panels(read()[part])
