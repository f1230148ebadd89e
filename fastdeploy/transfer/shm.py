"""Reads of pages of another process of this machine, out of its shared segment. CPU only; the reference transport.

The segment has no name. A peer opens it read-only through /proc, which the kernel allows to processes of the same user
that see each other. It is mapped whole; pages that the owner never wrote take no memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastdeploy.errors import PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint
from fastdeploy.transfer.layout import SharedHeads
from fastdeploy.transfer.mapped import MappedPeer, MappedTransport, open_process
from fastdeploy.transfer.memory import HEADER_BYTES, PageMemory, read_header

_PIECE_BYTES = 4 << 20  # copied between two looks at the deadline


class ShmAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the owner's segment is."""

    process_id: int
    descriptor: int


class ShmTransport(MappedTransport):
    """Implements Transport. Raises TransferUnavailable when the pages are not in a shared segment."""

    def __init__(self, memory: PageMemory, owner: str, host: str, port: int) -> None:
        del owner, host, port
        if memory.segment is None:
            raise TransferUnavailable("shm: the KV pages of this rank are not in a segment that peers can map")
        super().__init__(memory, "shm", _PIECE_BYTES)
        self._address = ShmAddress(os.getpid(), memory.segment)

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def _map(self, peer: Endpoint, heads: SharedHeads) -> MappedPeer:
        try:
            address = msgspec.msgpack.decode(peer.transports["shm"], type=ShmAddress)
        except (KeyError, msgspec.DecodeError) as error:
            raise TransferUnavailable(f"shm: {peer.host} offers no address for it: {error!r}") from error
        process = open_process("shm", address.process_id, peer)
        try:
            # With the header right and the process alive afterwards it is the one.
            return MappedPeer(peer, heads, process, _map_pages(address, peer))
        except BaseException:
            os.close(process)
            raise


def _map_pages(address: ShmAddress, peer: Endpoint) -> Tensor:
    """The peer's pages, read-only; the mapping lives as long as the tensor."""
    path = f"/proc/{address.process_id}/fd/{address.descriptor}"
    n_bytes = HEADER_BYTES + peer.layout.total_bytes
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            header = read_header(os.pread(descriptor, HEADER_BYTES, 0))
            if header.owner != peer.owner or header.layout != peer.layout:
                raise ValueError("it belongs to another rank")
            if os.fstat(descriptor).st_size != n_bytes:
                raise ValueError(f"it has not {n_bytes} bytes")
            mapping = mmap.mmap(descriptor, n_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except (FileNotFoundError, ValueError) as error:
            raise PeerGone(f"shm: {path} is not the memory of {peer.owner}, which has ended: {error}") from error
        except OSError as error:
            raise TransferUnavailable(
                f"shm: {path} of {peer.host} cannot be mapped: {error}; both ranks must run as one user and see each "
                f"other in /proc; without that, --cache-transfer-protocol rdma"
            ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors; nothing here writes
        flat = torch.from_numpy(np.frombuffer(mapping, np.uint8, offset=HEADER_BYTES))
    return flat.view(peer.layout.n_layers, peer.layout.n_pages, peer.layout.page_bytes)
