"""What the layers of one rank ask of the others of its replica: sums of partial results, and logits put together.

On a CPU the terms of a sum are added in the order of the ranks, so that every rank gets the same bits. Nothing here
waits for the device of a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from fastdeploy.distributed import shared_region
from fastdeploy.distributed.groups import STEP_PATIENCE_S, Connection, Group
from fastdeploy.distributed.shared_region import TELL_FIRST_S, SharedRegion
from fastdeploy.distributed.topology import Position, run_of
from fastdeploy.errors import EngineDeadError

if TYPE_CHECKING:
    from fastdeploy.distributed.all_to_all.base import AllToAll

_REGION_BYTES = 16 << 20  # of what all ranks bring at a time; memory is taken only where something was written


class TensorCollectives(Protocol):
    """Over the tensor ranks of a replica, which all bring a tensor of the same shape."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors; may reuse the memory of `x`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, stacked in the order of the ranks."""
        ...


class Peers:
    """The other ranks, as layers see them: there from the start, reached once `connect` was called."""

    def __init__(self, where: Position | None = None) -> None:
        self.where = where or Position()
        self._collectives: TensorCollectives | None = None
        self._all_to_all: AllToAll | None = None

    def connect(self, collectives: TensorCollectives | None, all_to_all: AllToAll | None) -> None:
        """From here on layers may compute. None: this rank has no such others."""
        self._collectives = collectives
        self._all_to_all = all_to_all

    @property
    def all_to_all(self) -> AllToAll:
        """How rows reach the ranks of their experts."""
        assert self._all_to_all is not None, "forward before connect"
        return self._all_to_all

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over the tensor ranks; may reuse the memory of `x`."""
        if self.where.n_tensor == 1 or x.numel() == 0:
            return x
        assert self._collectives is not None, "forward before connect"
        return self._collectives.all_reduce_sum(x)

    def gather_columns(self, x_rN: Tensor, n_total: int) -> Tensor:
        """[r, n_total] from the runs of columns (`run_of`) that the tensor ranks hold."""
        n_tensor, n_rows = self.where.n_tensor, x_rN.shape[0]
        if n_tensor == 1:
            return x_rN
        if n_rows == 0:
            return x_rN.new_empty(0, n_total)
        assert self._collectives is not None, "forward before connect"
        sizes = [run_of(n_total, n_tensor, part)[1] for part in range(n_tensor)]
        if x_rN.shape[1] < sizes[0]:  # runs differ by one column at most
            x_rN = torch.cat((x_rN, x_rN.new_zeros(n_rows, sizes[0] - x_rN.shape[1])), 1)
        parts_grN = self._collectives.all_gather(x_rN.contiguous())
        return torch.cat([part_rN[:, :size] for part_rN, size in zip(parts_grN, sizes, strict=True)], 1)


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, added from the first to the last; a new tensor."""
    if len(parts) == 1:
        return parts[0].clone()
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


class SharedCollectives:
    """Ranks of one machine, on its CPU."""

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._part_bytes = region.n_bytes // region.size // 64 * 64

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        sums = [sum_in_order(parts) for parts in self._exchange(x)]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(x.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        stacks = [torch.stack(parts) for parts in self._exchange(x)]
        return (stacks[0] if len(stacks) == 1 else torch.cat(stacks, 1)).view(self._region.size, *x.shape)

    def _exchange(self, x: Tensor) -> Iterator[list[Tensor]]:
        """All ranks' elements, flat, as many at a time as the region holds; read them before asking for more."""
        flat = x.reshape(-1)
        n_part = self._part_bytes // x.element_size()
        for mine in flat.split(n_part):
            buffer = self._region.buffer()
            parts = [buffer[i * self._part_bytes :][: mine.nbytes].view(x.dtype) for i in range(self._region.size)]
            parts[self._region.rank].copy_(mine)
            self._region.meet()
            yield parts


class GroupCollectives:
    """Ranks that a process group connects: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, group: Connection, name: str) -> None:
        self._group = group
        self._name = name

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            x = x.contiguous()
            self._group.allreduce([x]).wait()
            return x
        return sum_in_order(list(self.all_gather(x)))

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(self._group.size(), *x.shape)
        with group_errors(self._name):
            # As bytes: gloo knows few types.
            self._group._allgather_base(out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8)).wait()
        return out


def make_collectives(group: Group) -> TensorCollectives | None:
    """For the tensor ranks of a replica, which are on one machine; they make theirs together. None for one rank."""
    if group.tensor is None:
        return None
    if group.device.type == "cuda" or not shared_region.is_supported():
        return GroupCollectives(group.tensor, group.name)
    assert group.store is not None, "a group of several ranks has a store"
    region = SharedRegion(
        PrefixStore(f"collectives{group.where.data_rank}", group.store),
        group.where.tensor_rank,
        group.tensor_names(),
        _REGION_BYTES,
        n_ranks_here=group.n_ranks_here,
        deadline_s=STEP_PATIENCE_S,
    )
    return SharedCollectives(region)


@contextmanager
def group_errors(name: str) -> Iterator[None]:
    """What a process group raises when a rank is gone or late, as our own error; `name` is this rank's."""
    try:
        yield
    except RuntimeError as exc:
        # This error cannot name the rank that is gone. That one's core can, and ends the group unless it is gone too.
        time.sleep(TELL_FIRST_S)
        raise EngineDeadError(
            f"{name}: an exchange with the other ranks of its group failed: {exc}; see the logs of those"
        ) from exc
