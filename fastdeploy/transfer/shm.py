"""Reads of pages of another process of this machine, out of its shared segment. CPU only; the reference transport.

The segment has no name. A peer opens it read-only through /proc, which the kernel allows to processes of the same user
that see each other. It is mapped whole; pages that the owner never wrote take no memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastdeploy.errors import PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.checks import expected_checks, verify
from fastdeploy.transfer.layout import SharedHeads, shared_heads
from fastdeploy.transfer.ledger import Ledger
from fastdeploy.transfer.memory import HEADER_BYTES, PageMemory, copy_pages, read_header, words_of
from fastdeploy.transfer.pool import PoolPull, PullPool, Stop

_PIECE_BYTES = 4 << 20  # copied between two looks at the deadline


class ShmAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the owner's segment is."""

    process_id: int
    descriptor: int


@dataclass(eq=False, slots=True)
class ShmPeer:
    """Implements Peer. `process` is a pidfd; `pages` the peer's pages, uint8 [n_layers, n_pages, page_bytes]."""

    endpoint: Endpoint
    heads: SharedHeads
    process: int
    pages: Tensor


class ShmTransport:
    """Implements Transport. Raises TransferUnavailable when the pages are not in a shared segment."""

    def __init__(self, memory: PageMemory, owner: str, host: str, port: int) -> None:
        if memory.segment is None:
            raise TransferUnavailable("shm: the KV pages of this rank are not in a segment that peers can map")
        self._memory = memory
        self._address = ShmAddress(os.getpid(), memory.segment)
        self._pool = PullPool(Ledger(memory.layout), "shm")
        self._peers: dict[str, ShmPeer] = {}

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def connect(self, peer: Endpoint) -> ShmPeer:
        known = self._peers.get(peer.owner)
        if known is not None:
            self._check_alive(known)
            return known
        heads = shared_heads(self._memory.layout, peer.layout)
        try:
            address = msgspec.msgpack.decode(peer.transports["shm"], type=ShmAddress)
        except (KeyError, msgspec.DecodeError) as error:
            raise TransferUnavailable(f"shm: {peer.host} offers no address for it: {error!r}") from error
        process = _open_process(address, peer)
        try:
            pages = _map_pages(address, peer)
            connected = ShmPeer(peer, heads, process, pages)
            self._check_alive(connected)  # with the header right and the process alive it is the one
        except BaseException:
            os.close(process)
            raise
        self._peers[peer.owner] = connected
        return connected

    def pull(self, peer: ShmPeer, source: PageSet, page_ids: Sequence[int], deadline_s: float) -> PoolPull:
        self._check_alive(peer)
        targets = list(page_ids)
        return self._pool.start(peer, source, targets, deadline_s, partial(self._copy, peer, source, targets))

    def poll(self, pull: PoolPull) -> Literal["pending", "done"]:
        return self._pool.poll(pull)

    def cancel(self, pull: PoolPull) -> None:
        self._pool.cancel(pull)

    def forget(self, request_id: str) -> None:
        self._pool.ledger.forget(request_id)

    def disconnect(self, peer: ShmPeer) -> None:
        if self._peers.pop(peer.endpoint.owner, None) is not None:
            self._pool.cancel_of(peer)
            peer.pages = torch.empty(0, dtype=torch.uint8)  # unmaps: the owner's memory may be kept by this alone
            os.close(peer.process)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self.disconnect(peer)
        self._pool.close()

    def _check_alive(self, peer: ShmPeer) -> None:
        if peer.pages.numel():  # else it was disconnected
            poll = select.poll()
            poll.register(peer.process, select.POLLIN)
            if not poll.poll(0):
                return
            self.disconnect(peer)
        raise PeerGone(
            f"shm: the rank whose pages were to be read has ended or was disconnected ({peer.endpoint.host})"
        )

    def _copy(self, peer: ShmPeer, source: PageSet, targets: list[int], stop: Stop) -> None:
        """Copy and check piece by piece, on a thread of the pool."""
        layout, heads, theirs, pages = self._memory.layout, peer.heads, peer.endpoint.layout, peer.pages
        expected_lnh = expected_checks(source, theirs.n_kv_heads, heads)
        from_ids, to_ids = (torch.tensor(ids, dtype=torch.int64) for ids in (source.page_ids, targets))
        n_piece = max(1, _PIECE_BYTES // layout.page_bytes)
        for index in range(source.n_layers):
            layer = source.first_layer + index
            from_p2hW = words_of(pages[layer], theirs)[:, :, heads.first_theirs : heads.first_theirs + heads.n_heads]
            to_p2hW = self._memory.heads(layer, heads.first_mine, heads.n_heads)
            for first in range(0, len(targets), n_piece):
                stop.check()
                piece = slice(first, first + n_piece)
                found_nh = copy_pages(from_p2hW, from_ids[piece], to_p2hW, to_ids[piece])
                verify(found_nh, expected_lnh[index, piece], source, layer, source.page_ids[piece], peer.endpoint.host)


def _open_process(address: ShmAddress, peer: Endpoint) -> int:
    try:
        return os.pidfd_open(address.process_id)
    except ProcessLookupError as error:
        raise PeerGone(f"shm: process {address.process_id} of {peer.host} has ended") from error
    except OSError as error:
        raise TransferUnavailable(
            f"shm: process {address.process_id} of {peer.host} cannot be opened: {error}"
        ) from error


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
