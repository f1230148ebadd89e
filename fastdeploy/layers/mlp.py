"""The gated feed-forward network, and the dense layer that is one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.distributed.sharding import FFNShare
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.packed_ffn import PackedFFN, packed_ffn_available
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource
from fastdeploy.runner.step import StepContext


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020); gate and up are one matrix. `down_bias` None is `bias`."""

    def __init__(
        self, hidden_size: int, width: int, place: Placement, *, bias: bool = False, down_bias: bool | None = None
    ) -> None:
        super().__init__()
        self.packed = None
        if not bias and packed_ffn_available(place):
            self.packed = PackedFFN(1, hidden_size, width, place)
            return
        self.gate_up = Linear(hidden_size, (width, width), place, bias=bias)
        self.down = Linear(width, (hidden_size,), place, bias=bias if down_bias is None else down_bias)

    def forward(self, x_tH: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed(x_tH)  # type: ignore[no-any-return]
        both_tX = self.gate_up(x_tH)
        if both_tX.is_cuda:
            # Triton is there on GPUs only.
            from fastdeploy.kernels.silu_mul import silu_mul

            return self.down(silu_mul(both_tX))  # type: ignore[no-any-return]
        gate_tM, up_tM = both_tX.chunk(2, dim=-1)
        return self.down(functional.silu(gate_tM).mul_(up_tM))  # type: ignore[no-any-return]

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.{gate,up,down}_proj`."""
        if self.packed is not None:
            self.packed.load_each(weights, (name,))
            return
        self.gate_up.load(weights, (f"{name}.gate_proj", f"{name}.up_proj"))
        self.down.load(weights, (f"{name}.down_proj",))


class DenseFFN(nn.Module):
    """A gated FFN of `width`, of which every tensor rank holds a run."""

    def __init__(self, hidden_size: int, width: int, place: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.peers = place.peers
        where = place.peers.where
        # Only one rank adds the bias of what is summed up.
        down_bias = bias and where.tensor_rank == 0
        self.ffn = GatedMLP(hidden_size, width // where.n_tensor, place, bias=bias, down_bias=down_bias)

    def forward(self, x_tH: Tensor, _step: StepContext) -> Tensor:
        return self.peers.all_reduce_sum(self.ffn(x_tH))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from this rank's share of `NAME.{gate,up,down}_proj`."""
        where = self.peers.where
        self.ffn.load(FFNShare(weights, where.n_tensor, where.tensor_rank), name)
