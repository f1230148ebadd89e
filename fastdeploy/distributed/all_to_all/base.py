"""How rows reach the ranks of their experts and come back: what a backend is, and the table of those there are.

Sizes come from what all ranks agreed on before the step, never from the routing: every rank gets the rows of all ranks
and leaves alone those that none of its experts wants. So nothing waits for the device, and graphs can hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastdeploy.distributed import shared_region
from fastdeploy.distributed.groups import Group
from fastdeploy.distributed.peer_memory import peers_reachable
from fastdeploy.distributed.topology import run_of
from fastdeploy.errors import ConfigError
from fastdeploy.layers.moe.gate import Routing

if TYPE_CHECKING:
    from fastdeploy.kernels.moe_rows import SlotOutputs


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """What is exchanged: rows of `hidden_size` in `dtype`, each with k of `n_experts` experts.

    `every_row`: each rank also computes something for all rows; otherwise it may get rows only that want its experts.
    """

    n_experts: int
    n_experts_per_token: int
    hidden_size: int
    dtype: torch.dtype
    every_row: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of hidden states."""
        return self.hidden_size * self.dtype.itemsize

    def local_ids(self, group: Group) -> Tensor:
        """Table [n_experts + 1] from an expert's number to that among this rank's, `n_local` for one elsewhere.

        The last entry is for rows that go nowhere.
        """
        first, n_local = run_of(self.n_experts, group.where.group_size, group.where.group_rank)
        table = torch.full((self.n_experts + 1,), n_local, device=group.device)
        table[first : first + n_local] = torch.arange(n_local, device=group.device)
        return table


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows of all ranks in the order of the ranks: x_rH [r, H], and which of this rank's experts each goes to.

    `routing.expert_tk` counts local experts; `n_local` stands for one elsewhere. `n_rows_g`: rows that each rank sent.
    What `dispatch` gave may be overwritten from `combine` on.
    """

    x_rH: Tensor
    routing: Routing
    n_rows_g: tuple[int, ...]


def pack_rows(x_tH: Tensor, routing: Routing) -> Tensor:
    """Rows with their routing as one message, uint8 [t, bytes]."""
    parts = (x_tH, routing.expert_tk, routing.weight_tk)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def unpack_rows(message_rB: Tensor, rows: ExpertRows, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(x_rH, expert_rk by number among all, weight_rk) of what `pack_rows` made."""
    k = rows.n_experts_per_token
    sizes = (rows.row_bytes, k * torch.int64.itemsize, k * weight_dtype.itemsize)
    # Copies, because other dtypes need their own alignment.
    x_rB, expert_rB, weight_rB = (p.clone(memory_format=torch.contiguous_format) for p in message_rB.split(sizes, 1))
    return x_rB.view(rows.dtype), expert_rB.view(torch.int64), weight_rB.view(weight_dtype)


class AllToAll(Protocol):
    """One exchange at a time: `dispatch`, then `combine` of what the experts made of it. All ranks make both calls."""

    max_rows: int | None  # rows of all ranks together that fit into one exchange
    adds_slots: bool  # whether `combine` takes what the experts made of each slot of a row

    def dispatch(self, x_tH: Tensor, routing: Routing, n_rows_g: tuple[int, ...]) -> Dispatched:
        """Send this rank's rows, n_rows_g[its group rank] of them, and get those of all."""
        ...

    def combine(self, y_rH: Tensor | SlotOutputs, sent: Dispatched, own: Callable[[], Tensor] | None = None) -> Tensor:
        """For each row of this rank, [t, H], the sum over all ranks of what their experts gave.

        `own` computes what this rank adds to its rows, [t, H]: called once, if possible while others are waited for.
        """
        ...


BACKENDS = {
    "shm": "shm:SharedAllToAll",
    "gloo": "gloo:GlooAllToAll",
    "symm_mem": "symm_mem:SymmetricAllToAll",
    "nccl": "nccl:NcclAllToAll",
}


def exchange_name(group: Group, asked: str | None = None) -> str:
    """The backend for a group: the one asked for, or what fits its device and machines. Raises ConfigError."""
    fitting = ["nccl"] if group.device.type == "cuda" else ["gloo"]
    if group.device.type == "cpu" and group.one_host and shared_region.is_supported():
        fitting.insert(0, "shm")
    if group.device.type == "cuda" and group.one_host and peers_reachable(group.n_ranks_here):
        fitting.insert(0, "symm_mem")
    if asked and asked not in fitting:
        raise ConfigError(
            f"FD_ALL_TO_ALL {asked}: must be {' or '.join(fitting)} for ranks on {group.device.type}"
            f"{'' if group.one_host else ' of several machines'}, or empty"
        )
    return asked or fitting[0]


def make_all_to_all(name: str, group: Group, rows: ExpertRows) -> AllToAll:
    """The backend called `name` for all ranks of `group`, which make theirs together."""
    module, cls = BACKENDS[name].split(":")
    backend: AllToAll = getattr(import_module(f"fastdeploy.distributed.all_to_all.{module}"), cls)(group, rows)
    return backend
