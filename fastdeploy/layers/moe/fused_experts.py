"""The experts of a sparse layer on a CUDA device: stacked weights and fused kernels."""

from __future__ import annotations

from torch import Tensor, nn

from fastdeploy.errors import ConfigError
from fastdeploy.kernels.moe import ExpertWeights, fused_moe, moe_slots
from fastdeploy.kernels.moe_many_fp8 import fits_hopper
from fastdeploy.kernels.moe_rows import SlotOutputs
from fastdeploy.kernels.moe_tiles import load_tiles
from fastdeploy.kernels.quantize import RowsFp8
from fastdeploy.kernels.weight_formats import CODE_DTYPES
from fastdeploy.layers.moe.expert_stacks import Expert, Part, load_stacks
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.placement import Placement
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

    def slots(self, x_rH: Tensor, routing: Routing, rows8: RowsFp8 | None = None) -> SlotOutputs:
        """`forward` but for the last addition, for who adds up anyway; `rows8` is x in FP8, if it is there already."""
        assert self.weights is not None, "forward before load"
        return moe_slots(x_rH, self.weights, routing.expert_tk, routing.weight_tk, self.tiles, rows8)

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
        experts = [self._parts(weights, f"{name}.{first_expert + i}", self.width, 0) for i in range(self.n_local)]
        experts += [
            self._parts(shared_weights or weights, shared_name, self.n_shared * self.width, i * self.width)
            for i in range(self.n_shared)
        ]
        (gate_up, gate_up_scale), (down, down_scale) = load_stacks(experts, self.hidden_size, self.width, self.place)
        self.weights = ExpertWeights(gate_up, down, self.n_shared, gate_up_scale, down_scale)

    @property
    def takes_fp8_rows(self) -> bool:
        """Whether rows are multiplied in FP8, so that `slots` has use for them in that form."""
        return self.place.quantization == "block_wise_fp8"

    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return 0 if self.weights is None else self.weights.n_bytes()

    def _parts(self, weights: WeightSource, name: str, width: int, first: int) -> Expert:
        """Gate, up and down: `self.width` rows (columns of down) from `first` on of an FFN of `width`."""
        cut = slice(first, first + self.width)
        gate, up = (weights.require(f"{name}.{x}_proj.weight", (width, self.hidden_size)) for x in ("gate", "up"))
        down = weights.require(f"{name}.down_proj.weight", (self.hidden_size, width))
        return Part(gate, cut), Part(up, cut), Part(down, None, cut)


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
