"""The experts of a sparse layer on a CUDA device: stacked weights and fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastdeploy.config.schema import Quantization
from fastdeploy.errors import ConfigError
from fastdeploy.kernels.moe import ExpertWeights, fused_moe, moe_slots
from fastdeploy.kernels.moe_many_fp8 import fits_hopper
from fastdeploy.kernels.moe_rows import SlotOutputs
from fastdeploy.kernels.moe_tiles import load_tiles
from fastdeploy.kernels.weight_formats import CODE_DTYPES, quantize
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.placement import Placement
from fastdeploy.layers.upload import Uploader
from fastdeploy.models.weights import WeightSource

_ROW_ALIGNMENT_BYTES = 16  # of the copy engine


class FusedExperts(nn.Module):
    """`n_local` gated FFNs of width M, applied to the rows routed to them; see LocalExperts.

    With `shared_width`, a multiple of M, the FFN that every row passes is computed along: it is cut into experts of
    width M whose outputs add up to its own, so that a decode step reads its weights in the same launches. Weights are
    held in the format that `place` names; with block-wise FP8, activations are rounded when they are used.
    """

    def __init__(
        self,
        n_local: int,
        hidden_size: int,
        width: int,
        place: Placement,
        *,
        shared_width: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, width, shared_width, place)
        self.n_local = n_local
        self.n_shared = shared_width // width
        self.width = width
        self.hidden_size = hidden_size
        self.place = place
        self.weights: ExpertWeights | None = None
        dtype = place.dtype if place.quantization is None else CODE_DTYPES[place.quantization]
        self.tiles = load_tiles(place.device, n_local, hidden_size, width, dtype)

    def forward(self, x_rH: Tensor, routing: Routing) -> Tensor:
        """Sum over a row's local experts of weight times FFN, plus the shared FFN if it is here; [r, H]."""
        assert self.weights is not None, "forward before load"
        return fused_moe(x_rH, self.weights, routing.expert_tk, routing.weight_tk, self.tiles)

    def slots(self, x_rH: Tensor, routing: Routing) -> SlotOutputs:
        """`forward` but for the last addition, for who adds up anyway."""
        assert self.weights is not None, "forward before load"
        return moe_slots(x_rH, self.weights, routing.expert_tk, routing.weight_tk, self.tiles)

    def load(
        self,
        weights: WeightSource,
        name: str,
        first_expert: int = 0,
        shared_name: str = "",
        shared_weights: WeightSource | None = None,
    ) -> None:
        """Fill from `NAME.J.{gate,up,down}_proj.weight`, J from `first_expert` on, and `SHARED_NAME.*` alike.

        `shared_weights` is where the latter are, if not in `weights`.

        Raises CheckpointError when a tensor is missing or has another shape.
        """
        n_experts, device = self.n_local + self.n_shared, self.place.device
        dtype, hidden_size = self.place.dtype, self.hidden_size
        gate_up_eXH = torch.empty(n_experts, 2 * self.width, hidden_size, dtype=dtype, device=device)
        down_eHM = torch.empty(n_experts, hidden_size, self.width, dtype=dtype, device=device)
        with Uploader(device) as uploader:
            for i in range(self.n_local):
                read = self._readers(weights, f"{name}.{first_expert + i}", self.width, 0)
                self._put(uploader, gate_up_eXH[i], down_eHM[i], read)
            for i in range(self.n_shared):
                read = self._readers(shared_weights or weights, shared_name, self.n_shared * self.width, i * self.width)
                self._put(uploader, gate_up_eXH[self.n_local + i], down_eHM[self.n_local + i], read)
        if self.place.quantization is None:
            self.weights = ExpertWeights(gate_up_eXH, down_eHM, self.n_shared)
            return
        (gate_up, gate_up_scale), (down, down_scale) = (
            _quantize(stack, self.place.quantization) for stack in (gate_up_eXH, down_eHM)
        )
        self.weights = ExpertWeights(gate_up, down, self.n_shared, gate_up_scale, down_scale)

    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return 0 if self.weights is None else self.weights.n_bytes()

    def _readers(self, weights: WeightSource, name: str, width: int, first: int) -> list[Callable[[], Tensor]]:
        """Of gate, up and down: `self.width` rows (columns of down) from `first` on of an FFN of `width`."""
        part = slice(first, first + self.width)
        gate, up = (weights.require(f"{name}.{x}_proj.weight", (width, self.hidden_size)) for x in ("gate", "up"))
        down = weights.require(f"{name}.down_proj.weight", (self.hidden_size, width))
        return [partial(gate.read, part), partial(up.read, part), partial(down.read, None, part)]

    def _put(self, uploader: Uploader, gate_up_XH: Tensor, down_HM: Tensor, read: list[Callable[[], Tensor]]) -> None:
        uploader.put(gate_up_XH[: self.width], read[0])
        uploader.put(gate_up_XH[self.width :], read[1])
        uploader.put(down_HM, read[2])


def _check_sizes(hidden_size: int, width: int, shared_width: int, place: Placement) -> None:
    name, itemsize = place.quantization, place.dtype.itemsize
    if name is None and (hidden_size * itemsize % _ROW_ALIGNMENT_BYTES or width * itemsize % _ROW_ALIGNMENT_BYTES):
        raise ConfigError(
            f"experts of width {width} and hidden size {hidden_size} in {place.dtype}: rows must be multiples of "
            f"{_ROW_ALIGNMENT_BYTES} bytes on this device"
        )
    if name == "block_wise_fp8" and not fits_hopper(place.device, hidden_size, width):
        raise ConfigError(
            f"--quantization {name}: experts of width {width} (on each rank) and hidden size {hidden_size}: these need "
            f"a Hopper GPU, a width in 128s and a hidden size in 256s; wint8 and wint4 take any"
        )
    if shared_width % width:
        raise ValueError(f"a shared FFN of width {shared_width} is no multiple of the experts' width {width}")


def _quantize(stack: Tensor, name: Quantization) -> tuple[Tensor, Tensor]:
    """Expert by expert, so that the float32 copies in between stay small."""
    parts = [quantize(weight, name) for weight in stack]
    return torch.stack([codes for codes, _ in parts]), torch.stack([scale for _, scale in parts])
