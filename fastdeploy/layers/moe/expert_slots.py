"""Where the experts of one sparse layer lie when they may move and have copies (`--enable-eplb`).

To the exchange and to the kernels slots are what experts are otherwise: so many on each rank, one after the other.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from fastdeploy.config.schema import MoEShape
from fastdeploy.distributed.expert_placement import Slots, place, slots_per_rank
from fastdeploy.distributed.topology import Position
from fastdeploy.errors import ConfigError
from fastdeploy.kernels.expert_slots_ref import slots_of_ref
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.packed_ffn import PackedFFN
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import StoredTensor, WeightSource


class ExpertSlots:
    """The slots of one layer: `slots` on the host, the same as a table on the device, and the rows of each expert.

    Until `move_to` it is the placement for experts of which nothing is known. `rows_e` int64 [e] counts the rows that
    this rank sent to each expert since somebody set it to zero.
    """

    def __init__(self, moe: MoEShape, where: Position, n_redundant: int, device: torch.device) -> None:
        self.n_experts = moe.n_experts
        self.n_local = slots_per_rank(moe.n_experts, n_redundant, where.group_size)
        self.slots = place([0] * moe.n_experts, where.group_size, self.n_local)
        self.rows_e = torch.zeros(moe.n_experts, dtype=torch.int64, device=device)
        self._rank = where.group_rank
        n_most = min(where.group_size, len(self.slots) - moe.n_experts + 1)
        self._table_eX = torch.zeros(moe.n_experts, 1 + n_most, dtype=torch.int32, device=device)
        self.move_to(self.slots)

    def __call__(self, routing: Routing) -> Routing:
        """The same rows with slots for experts. Ranks begin with different copies: each may send one row."""
        expert_tk = routing.expert_tk
        if expert_tk.is_cuda:
            # Triton is there on GPUs only.
            from fastdeploy.kernels.expert_slots import slots_of

            return Routing(slots_of(expert_tk, self._table_eX, self.rows_e, self._rank), routing.weight_tk)
        return Routing(slots_of_ref(expert_tk, self._table_eX, self.rows_e, self._rank), routing.weight_tk)

    def move_to(self, slots: Slots) -> None:
        """Rows go to these slots from here on, also in captured graphs; the weights must be there by then."""
        self.slots = slots
        width = self._table_eX.shape[1]
        slots_e: list[list[int]] = [[] for _ in range(self.n_experts)]
        for slot, expert in enumerate(slots):
            slots_e[expert].append(slot)
        table = [[len(held), *held, *[0] * (width - 1 - len(held))] for held in slots_e]
        self._table_eX.copy_(torch.tensor(table, dtype=torch.int32))

    def weights(self, source: WeightSource, name: str) -> WeightSource:
        """`source` with the weights of this rank's slot J, whichever expert it holds, as `NAME.J.*`."""
        first = self._rank * self.n_local
        return _SlotWeights(source, name, self.slots[first : first + self.n_local])


class _SlotWeights:
    def __init__(self, source: WeightSource, name: str, experts: Slots) -> None:
        self._source, self._prefix, self._experts = source, f"{name}.", experts

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        slot, _, rest = name.removeprefix(self._prefix).partition(".")
        return self._source.require(f"{self._prefix}{self._experts[int(slot)]}.{rest}", shape)


def make_slots(moe: MoEShape, place: Placement) -> ExpertSlots | None:
    """The slots of a layer; None where experts stay where they are."""
    if place.redundant_experts is None:
        return None
    return ExpertSlots(moe, place.peers.where, place.redundant_experts, place.device)


def stacked_weights(experts: object, n_local: int) -> list[Tensor]:
    """Every weight of loaded experts, each a view [n_local, ...] of what a step reads: to write is to replace them.

    Raises ConfigError for experts that are held in another way.
    """
    if isinstance(experts, PackedFFN) and experts.ffn is not None:
        return list(experts.ffn.panels)
    stacked = getattr(experts, "weights", None)
    if not is_dataclass(stacked):
        raise ConfigError(
            "--enable-eplb: on a CPU it needs --dtype float32 and a C compiler, for experts whose weights can be moved"
        )
    found = [getattr(stacked, field.name) for field in fields(stacked)]
    stacks = [tensor for tensor in found if isinstance(tensor, Tensor)]
    n_held = n_local + int(getattr(experts, "n_shared", 0))
    assert all(stack.shape[0] == n_held and stack.is_contiguous() for stack in stacks), "weights are not stacked"
    return [stack[:n_local] for stack in stacks]
