"""The process group of a rank; the only place that makes one.

Groups are values that are passed on, not the process-wide ones of `torch.distributed`. The ranks meet at a TCP store
that the group's first rank opens; it and the connections between CPU ranks use the address of this machine in the
configuration alone, which is the loopback interface for a machine by itself.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    Work,
)

from fastdeploy.config.schema import ParallelConfig
from fastdeploy.distributed import topology
from fastdeploy.distributed.topology import Position
from fastdeploy.errors import EngineStartError

JOIN_PATIENCE_S = 300.0  # from a rank's own readiness to that of all others, which may read weights from slow disks
STEP_PATIENCE_S = 120.0  # for another rank in the middle of a step, which may compile kernels at its first
_POLL_S = 0.02
_BACKLOG = 1024
_HERE = "here/{}"  # key in the store: this rank has come


class Connection(Protocol):
    """What is used of a process group of torch."""

    def size(self) -> int: ...
    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def _allgather_base(self, output: Tensor, input: Tensor) -> Work: ...
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> Work: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that exchange tensors, and where this one stands among them.

    `everyone` connects all ranks of the group, `tensor` those of this replica; either is None when that is one rank.
    A group of one rank has no store.
    """

    where: Position
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    one_host: bool = True
    n_ranks_here: int = 1
    store: Store | None = None
    everyone: Connection | None = None
    tensor: Connection | None = None

    @property
    def name(self) -> str:
        """What this rank is called in messages."""
        return f"rank {self.where.number}"

    def names(self) -> list[str]:
        """What the ranks of the group are called."""
        first = self.where.number - self.where.group_rank
        return [f"rank {first + i}" for i in range(self.where.group_size)]

    def tensor_names(self) -> list[str]:
        """What the ranks of this replica are called."""
        first = self.where.number - self.where.tensor_rank
        return [f"rank {first + i}" for i in range(self.where.n_tensor)]


class Meeting(Protocol):
    """How one rank meets the others of its group."""

    def store(self) -> Store:
        """The store of the group, for which nobody else needs to have come yet."""
        ...

    def join(self) -> Group:
        """The group, once all ranks have come."""
        ...


def open_store(parallel: ParallelConfig, number: int) -> tuple[TCPStore, str, int]:
    """(the store, its host, its port) at which the group of rank `number`, its first one, meets.

    The port is a free one, bound before anyone hears of it. Raises EngineStartError when this machine does not have
    the address that the configuration gives it.
    """
    host = topology.host_of(parallel, number)
    try:
        listener = socket.create_server((host, 0), backlog=_BACKLOG)
    except OSError as exc:
        raise EngineStartError(
            f"rank {number}: cannot listen on {host}: {exc}; --ips must name the addresses of the machines, each "
            f"machine's own one in its place"
        ) from exc
    port: int = listener.getsockname()[1]
    patience = timedelta(seconds=JOIN_PATIENCE_S)
    store = TCPStore(host, port, None, True, patience, False, master_listen_fd=listener.detach())
    return store, host, port


def join(
    parallel: ParallelConfig,
    number: int,
    device: torch.device,
    host: str,
    port: int,
    store: TCPStore | None = None,
    *,
    patience_s: float = JOIN_PATIENCE_S,
    on_wait: Callable[[int, int], None] = lambda *_: None,
) -> Group:
    """Meet the other ranks of the group at the store on `host` and `port`; who has opened or reached it gives `store`.

    `on_wait(n_came, n_ranks)` is called about once a second. Raises EngineStartError that names the ranks that did not
    come within `patience_s`.
    """
    where = topology.position(parallel, number)
    if where.group_size == 1:
        return Group(where, device)
    if store is None:
        store = reach_store(number, host, port, patience_s)
    numbers = topology.numbers_of_group(parallel, number)
    store.set(_HERE.format(number), "")
    _wait_for_all(store, parallel, number, patience_s, on_wait)
    tensor_numbers = range(where.number - where.tensor_rank, where.number - where.tensor_rank + where.n_tensor)
    everyone = tensor = _connect(PrefixStore("everyone", store), numbers, number, parallel, device)
    if numbers != tensor_numbers:
        prefix = f"replica{where.data_rank}"
        tensor = _connect(PrefixStore(prefix, store), tensor_numbers, number, parallel, device)
    return Group(
        where,
        device,
        one_host=topology.is_one_host(parallel),
        n_ranks_here=topology.ranks_per_host(parallel),
        store=store,
        everyone=everyone,
        tensor=tensor,
    )


def reach_store(number: int, host: str, port: int, patience_s: float = JOIN_PATIENCE_S) -> TCPStore:
    """The store that the first rank of the group opened. Raises EngineStartError when it cannot be reached."""
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=patience_s), False)
    except RuntimeError as exc:
        raise EngineStartError(
            f"rank {number}: cannot reach the first rank of its group at {host}:{port} ({exc}); check that {host} "
            f"can be reached from this machine, that no firewall is between them, and the first rank's log"
        ) from exc


def _wait_for_all(
    store: TCPStore, parallel: ParallelConfig, number: int, patience_s: float, on_wait: Callable[[int, int], None]
) -> None:
    numbers = topology.numbers_of_group(parallel, number)
    missing = list(numbers)
    started_s = reported_s = time.monotonic()
    while missing:
        try:
            missing = [other for other in missing if not store.check([_HERE.format(other)])]
        except RuntimeError as exc:
            raise EngineStartError(
                f"rank {number}: the first rank of its group, rank {numbers[0]}, is gone ({exc}); see its log"
            ) from exc
        now_s = time.monotonic()
        if missing and now_s - started_s > patience_s:
            who = ", ".join(f"rank {other} on {topology.host_of(parallel, other)}" for other in missing)
            raise EngineStartError(
                f"rank {number}: waited {patience_s:.0f} s for {who}, which did not come; check that it was started "
                f"with the same --ips, --tensor-parallel-size and --data-parallel-size, and see its log"
            )
        if now_s - reported_s > 1.0:
            reported_s = now_s
            on_wait(len(numbers) - len(missing), len(numbers))
        if missing:
            time.sleep(_POLL_S)


def _connect(
    store: Store, numbers: range, number: int, parallel: ParallelConfig, device: torch.device
) -> Connection | None:
    """A process group of the ranks `numbers`, None for one rank."""
    if len(numbers) == 1:
        return None
    rank, patience = number - numbers[0], timedelta(seconds=STEP_PATIENCE_S)
    options: Any
    made: Any
    try:
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = patience
            made = ProcessGroupNCCL(store, rank, len(numbers), options)
            made.eager_connect_single_device(device)
        else:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = patience
            options._devices = [ProcessGroupGloo.create_device(hostname=topology.host_of(parallel, number))]
            made = ProcessGroupGloo(store, rank, len(numbers), options)
    except RuntimeError as exc:
        raise EngineStartError(
            f"rank {number}: cannot connect to ranks {numbers[0]} to {numbers[-1]} of its group: {exc}"
        ) from exc
    connection: Connection = made
    return connection
