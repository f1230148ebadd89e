"""Reads of pages of another GPU of this machine, or of the same one, out of memory opened through CUDA IPC.

The owner tells a handle of the allocation that its pages lie in. A peer maps it into its own device's address space
and a kernel of the reading GPU copies and checks the pages, over NVLink or PCIe. The owner's process has no part in
it. As the driver cannot map memory read-only, it is this file that never writes there.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from fastdeploy.errors import PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.checks import expected_checks, verify
from fastdeploy.transfer.cuda_driver import HANDLE_BYTES, CudaError, close_shared, open_shared, share
from fastdeploy.transfer.layout import SharedHeads, shared_heads
from fastdeploy.transfer.ledger import Ledger
from fastdeploy.transfer.memory import PageMemory, copy_pages, words_of
from fastdeploy.transfer.pool import PoolPull, PullPool, Stop

_PIECE_BYTES = 64 << 20  # copied between two looks at the deadline: a millisecond or less


class IpcAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the owner's pages are: `offset` bytes into the allocation of `handle`.

    started: when the process did, in clock ticks since the boot: its number may be another process's by now.
    """

    process_id: int
    started: int
    handle: bytes
    offset: int


@dataclass(eq=False, slots=True)
class IpcPeer:
    """Implements Peer. `process` is a pidfd, `start` the mapped allocation, `pages` those of the peer, which this
    process's device can read: uint8 [n_layers, n_pages, page_bytes]."""

    endpoint: Endpoint
    heads: SharedHeads
    process: int
    start: int
    pages: Tensor


class CudaIpcTransport:
    """Implements Transport. Raises TransferUnavailable when the pages are on no GPU, or cannot be shared."""

    def __init__(self, memory: PageMemory, owner: str, host: str, port: int) -> None:
        del owner, host, port
        if memory.pages.device.type != "cuda":
            raise TransferUnavailable("cuda_ipc: the KV pages of this rank are not on a GPU")
        self._memory, self._device = memory, memory.pages.device
        with torch.cuda.device(self._device):
            try:
                handle, offset = share(memory.pages.data_ptr())
            except CudaError as error:
                raise TransferUnavailable(
                    f"cuda_ipc: the KV pages cannot be shared: {error}; is expandable_segments on in "
                    f"PYTORCH_CUDA_ALLOC_CONF, or CUDA IPC off in this container?"
                ) from error
        self._address = IpcAddress(os.getpid(), _started(os.getpid()), handle, offset)
        self._streams = threading.local()
        self._pool = PullPool(Ledger(memory.layout), "cuda-ipc")
        self._peers: dict[str, IpcPeer] = {}

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def connect(self, peer: Endpoint) -> IpcPeer:
        known = self._peers.get(peer.owner)
        if known is not None:
            self._check_alive(known)
            return known
        heads = shared_heads(self._memory.layout, peer.layout)
        try:
            address = msgspec.msgpack.decode(peer.transports["cuda_ipc"], type=IpcAddress)
        except (KeyError, msgspec.DecodeError) as error:
            raise TransferUnavailable(f"cuda_ipc: {peer.host} offers no address for it: {error!r}") from error
        if len(address.handle) != HANDLE_BYTES or address.offset < 0:
            raise TransferUnavailable(f"cuda_ipc: the address that {peer.host} offers is none")
        process = _open_process(address, peer)
        try:
            connected = IpcPeer(peer, heads, process, *self._map(address, peer))
        except BaseException:
            os.close(process)
            raise
        self._peers[peer.owner] = connected
        self._check_alive(connected)  # it lived when its memory was mapped
        return connected

    def pull(self, peer: IpcPeer, source: PageSet, page_ids: Sequence[int], deadline_s: float) -> PoolPull:
        self._check_alive(peer)
        targets = list(page_ids)
        return self._pool.start(peer, source, targets, deadline_s, partial(self._copy, peer, source, targets))

    def poll(self, pull: PoolPull) -> Literal["pending", "done"]:
        return self._pool.poll(pull)

    def cancel(self, pull: PoolPull) -> None:
        self._pool.cancel(pull)

    def forget(self, request_id: str) -> None:
        self._pool.ledger.forget(request_id)

    def disconnect(self, peer: IpcPeer) -> None:
        if self._peers.pop(peer.endpoint.owner, None) is None:
            return
        self._pool.cancel_of(peer)
        peer.pages = torch.empty(0, dtype=torch.uint8)
        os.close(peer.process)
        with torch.cuda.device(self._device):
            close_shared(peer.start)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self.disconnect(peer)
        self._pool.close()

    def _map(self, address: IpcAddress, peer: Endpoint) -> tuple[int, Tensor]:
        layout = peer.layout
        try:
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().synchronize()  # the context is current on this thread from here on
                start = open_shared(address.handle)
        except CudaError as error:
            raise TransferUnavailable(
                f"cuda_ipc: memory of process {address.process_id} of {peer.host} cannot be mapped: {error}; the GPUs "
                f"must reach each other (nvidia-smi topo -p2p r); without that, --cache-transfer-protocol rdma"
            ) from error
        # A tensor made from a pointer would be of the owner's device, which this process may not even see.
        storage = torch._C._construct_storage_from_data_pointer(
            start + address.offset, self._device, layout.total_bytes
        )
        flat = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        return start, flat.view(layout.n_layers, layout.n_pages, layout.page_bytes)

    def _check_alive(self, peer: IpcPeer) -> None:
        if peer.pages.numel():  # else it was disconnected
            poll = select.poll()
            poll.register(peer.process, select.POLLIN)
            if not poll.poll(0):
                return
            self.disconnect(peer)
        raise PeerGone(
            f"cuda_ipc: the rank whose pages were to be read has ended or was disconnected ({peer.endpoint.host})"
        )

    def _copy(self, peer: IpcPeer, source: PageSet, targets: list[int], stop: Stop) -> None:
        """Copy and check piece by piece, on a thread of the pool and a stream of that thread."""
        layout, heads, theirs, pages = self._memory.layout, peer.heads, peer.endpoint.layout, peer.pages
        expected_lnh = expected_checks(source, theirs.n_kv_heads, heads)
        n_piece = max(1, _PIECE_BYTES // layout.page_bytes)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream()):
            from_ids, to_ids = (torch.tensor(ids, device=self._device) for ids in (source.page_ids, targets))
            for index in range(source.n_layers):
                layer = source.first_layer + index
                from_p2hW = words_of(pages[layer], theirs)[:, :, heads.first_theirs :][:, :, : heads.n_heads]
                to_p2hW = self._memory.heads(layer, heads.first_mine, heads.n_heads)
                for first in range(0, len(targets), n_piece):
                    stop.check()
                    piece = slice(first, first + n_piece)
                    found_nh = copy_pages(from_p2hW, from_ids[piece], to_p2hW, to_ids[piece])
                    host = peer.endpoint.host  # verify waits for the copy
                    verify(found_nh, expected_lnh[index, piece], source, layer, source.page_ids[piece], host)

    def _stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._streams, "mine", None)
        if stream is None:
            stream = self._streams.mine = torch.cuda.Stream(self._device)
        return stream


def _open_process(address: IpcAddress, peer: Endpoint) -> int:
    try:
        process = os.pidfd_open(address.process_id)
    except ProcessLookupError as error:
        raise PeerGone(f"cuda_ipc: process {address.process_id} of {peer.host} has ended") from error
    except OSError as error:
        raise TransferUnavailable(
            f"cuda_ipc: process {address.process_id} of {peer.host} cannot be opened: {error}"
        ) from error
    try:
        is_same = _started(address.process_id) == address.started
    except OSError:
        is_same = False
    if not is_same:
        os.close(process)
        raise PeerGone(f"cuda_ipc: process {address.process_id} of {peer.host} is another one by now")
    return process


def _started(process_id: int) -> int:
    """Clock ticks between the boot and the start of a process. Raises OSError when there is none."""
    stat = Path(f"/proc/{process_id}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the name in brackets may have spaces
