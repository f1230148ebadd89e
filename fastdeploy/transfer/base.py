"""How a rank reads KV pages of another: what travels in control messages, what a transport is, and the table of those.

Decode pulls: it reads from the pages of prefill and writes into its own, and nobody writes into the memory of another
process. So a transfer that comes late or twice can never spoil pages that meanwhile belong to somebody else.
This file needs no torch: engine cores handle its structs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from fastdeploy.transfer.layout import PageLayout

if TYPE_CHECKING:
    from fastdeploy.transfer.memory import PageMemory


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """All that a peer needs to read this rank's pages. It holds secrets: send it over authenticated channels only.

    owner: unique for each start of a rank, so that a rank started again is another owner.
    host: name or address of the machine, for messages and for transports that listen.
    machine: equal where two ranks share kernel, process table and network (`fastdeploy.transfer.machine`).
    device: "cpu" or "cuda".
    transports: by name of the protocol, what its `connect` wants to know.
    """

    owner: str
    host: str
    machine: str
    device: str
    layout: PageLayout
    transports: dict[str, bytes]


class PageSet(msgspec.Struct, frozen=True, array_like=True):
    """Pages that a rank offers to one request, for a run of layers.

    generation: grows with each time the owner computes the request's pages anew; from an older one nothing is read.
    page_ids: at the owner, in the order of the tokens.
    checks: from `fastdeploy.transfer.memory.PageMemory.checks`: uint64 [n_layers, n_pages, n_kv_heads] of the owner.
    """

    owner: str
    request_id: str
    generation: int
    page_ids: list[int]
    first_layer: int
    n_layers: int
    checks: bytes


class Peer(Protocol):
    """A rank whose pages can be read."""

    @property
    def endpoint(self) -> Endpoint:
        """What it was connected with."""
        ...


class Pull(Protocol):
    """One running or ended read of a page set."""

    @property
    def source(self) -> PageSet:
        """What is read."""
        ...


class Transport(Protocol):
    """One protocol of one rank: its own pages offered, those of peers read. Calls come from one thread."""

    def offer(self) -> bytes:
        """What `Endpoint.transports` holds for this protocol. It stays the same while the rank lives."""
        ...

    def connect(self, peer: Endpoint) -> Peer:
        """Make ready to read from a peer; again for a peer that is connected is cheap.

        Raises TransferUnavailable, PeerGone or LayoutMismatch, naming host, protocol and what to check.
        """
        ...

    def pull(self, peer: Peer, source: PageSet, page_ids: Sequence[int], deadline_s: float) -> Pull:
        """Start to read `source` into this rank's `page_ids` (as many, in the same order); returns at once.

        The key heads that both ranks hold are read. Until `poll` says "done" or raises, the own pages must be kept.
        Raises StalePages, or ValueError for page ids, layers or sizes that cannot be.
        """
        ...

    def poll(self, pull: Pull) -> Literal["pending", "done"]:
        """Whether all pages are here and have the check values offered.

        Raises a TransferError when the pull has failed; then nothing writes into the own pages any more.
        """
        ...

    def cancel(self, pull: Pull) -> None:
        """Give a pull up; returns when nothing writes into the own pages any more, which is soon."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is over: forget which of its pages were read."""
        ...

    def disconnect(self, peer: Peer) -> None:
        """Give up what `connect` took; running pulls from this peer fail."""
        ...

    def close(self) -> None:
        """Give up everything, threads included."""
        ...


TRANSPORTS = {
    "shm": "shm:ShmTransport",
    "tcp": "tcp:TcpTransport",
    "nixl": "nixl:NixlTransport",
    "cuda_ipc": "cuda_ipc:CudaIpcTransport",
}


def make_transport(name: str, memory: PageMemory, owner: str, host: str, port: int = 0) -> Transport:
    """The transport called `name` for the pages of this rank; a KeyError for an unknown name is our own bug.

    `owner` and `host` as in `Endpoint`; a transport that listens binds `host` and `port`, where 0 is any free port.
    Raises TransferUnavailable where it cannot work.
    """
    module, cls = TRANSPORTS[name].split(":")
    maker = getattr(import_module(f"fastdeploy.transfer.{module}"), cls)
    transport: Transport = maker(memory, owner, host, port)
    return transport
