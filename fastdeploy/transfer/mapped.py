"""Reads of pages that another process of this machine owns, out of memory that is mapped into this one as well.

The owner's process has no part in them. How its memory is found and mapped is for `shm.py` and `cuda_ipc.py` to say.
"""

from __future__ import annotations

import os
import select
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdeploy.errors import PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.checks import expected_checks, verify
from fastdeploy.transfer.layout import SharedHeads, shared_heads
from fastdeploy.transfer.memory import PageMemory, copy_pages, words_of
from fastdeploy.transfer.pool import PooledTransport, PoolPull, Stop


@dataclass(eq=False, slots=True)
class MappedPeer:
    """Implements Peer. `process` is a pidfd; `pages` the peer's pages, uint8 [n_layers, n_pages, page_bytes].

    `unmap` ends a mapping that does not end with `pages`.
    """

    endpoint: Endpoint
    heads: SharedHeads
    process: int
    pages: Tensor
    unmap: Callable[[], None] | None = None


class MappedTransport(PooledTransport[MappedPeer]):
    """A Transport but for `offer`, and for how memory is mapped."""

    def __init__(self, memory: PageMemory, name: str, piece_bytes: int) -> None:
        """`piece_bytes`: what is copied between two looks at the deadline."""
        super().__init__(memory, name)
        self._name, self._piece_bytes = name, piece_bytes

    @abstractmethod
    def _map(self, peer: Endpoint, heads: SharedHeads) -> MappedPeer:
        """Map the peer's pages. Raises TransferUnavailable, or PeerGone when another process has its number."""

    def connect(self, peer: Endpoint) -> MappedPeer:
        known = self._peers.get(peer.owner)
        if known is None:
            known = self._map(peer, shared_heads(self._memory.layout, peer.layout))
            self._peers[peer.owner] = known
        self._check_alive(known)  # also one that lived when its memory was mapped
        return known

    def pull(self, peer: MappedPeer, source: PageSet, page_ids: Sequence[int], deadline_s: float) -> PoolPull:
        self._check_alive(peer)
        targets = list(page_ids)
        return self._pool.start(peer, source, targets, deadline_s, partial(self._copy, peer, source, targets))

    def disconnect(self, peer: MappedPeer) -> None:
        if self._peers.pop(peer.endpoint.owner, None) is None:
            return
        self._pool.cancel_of(peer)
        peer.pages = torch.empty(0, dtype=torch.uint8)  # the owner's memory may be kept by this alone
        os.close(peer.process)
        if peer.unmap is not None:
            peer.unmap()

    def _check_alive(self, peer: MappedPeer) -> None:
        if peer.pages.numel():  # else it was disconnected
            poll = select.poll()
            poll.register(peer.process, select.POLLIN)
            if not poll.poll(0):
                return
            self.disconnect(peer)
        raise PeerGone(
            f"{self._name}: the rank whose pages were to be read has ended or was disconnected ({peer.endpoint.host})"
        )

    def _copy(self, peer: MappedPeer, source: PageSet, targets: list[int], stop: Stop) -> None:
        """Copy and check piece by piece, on a thread of the pool."""
        layout, heads, theirs, pages = self._memory.layout, peer.heads, peer.endpoint.layout, peer.pages
        expected_lnh = expected_checks(source, theirs.n_kv_heads, heads)
        device, host = self._memory.pages.device, peer.endpoint.host
        from_ids, to_ids = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (source.page_ids, targets))
        n_piece = max(1, self._piece_bytes // layout.page_bytes)
        for index in range(source.n_layers):
            layer = source.first_layer + index
            from_p2hW = words_of(pages[layer], theirs)[:, :, heads.first_theirs : heads.first_theirs + heads.n_heads]
            to_p2hW = self._memory.heads(layer, heads.first_mine, heads.n_heads)
            for first in range(0, len(targets), n_piece):
                stop.check()
                piece = slice(first, first + n_piece)
                found_nh = copy_pages(from_p2hW, from_ids[piece], to_p2hW, to_ids[piece])
                # Waits for the copy, where a GPU makes it.
                verify(found_nh, expected_lnh[index, piece], source, layer, source.page_ids[piece], host)


def open_process(name: str, process_id: int, peer: Endpoint) -> int:
    """A pidfd of the owner's process. Raises PeerGone and TransferUnavailable, which begin with `name`."""
    try:
        return os.pidfd_open(process_id)
    except ProcessLookupError as error:
        raise PeerGone(f"{name}: process {process_id} of {peer.host} has ended") from error
    except OSError as error:
        raise TransferUnavailable(f"{name}: process {process_id} of {peer.host} cannot be opened: {error}") from error
