"""Reads of pages of another GPU of this machine, or of the same one, out of memory opened through CUDA IPC.

The owner tells a handle of the allocation that its pages lie in. A peer maps it into its own device's address space
and a kernel of the reading GPU copies and checks the pages, over NVLink or PCIe. The owner's process has no part in
it. As the driver cannot map memory read-only, it is this file that never writes there.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from fastdeploy.errors import PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.cuda_driver import HANDLE_BYTES, CudaError, close_shared, open_shared, share
from fastdeploy.transfer.layout import SharedHeads
from fastdeploy.transfer.mapped import MappedPeer, MappedTransport, open_process
from fastdeploy.transfer.memory import PageMemory
from fastdeploy.transfer.pool import Stop

_PIECE_BYTES = 64 << 20  # copied between two looks at the deadline: a millisecond or less


class IpcAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the owner's pages are: `offset` bytes into the allocation of `handle`.

    started: when the process did, in clock ticks since the boot: its number may be another process's by now.
    """

    process_id: int
    started: int
    handle: bytes
    offset: int


class CudaIpcTransport(MappedTransport):
    """Implements Transport. Raises TransferUnavailable when the pages are on no GPU, or cannot be shared."""

    def __init__(self, memory: PageMemory, owner: str, host: str, port: int) -> None:
        del owner, host, port
        if memory.pages.device.type != "cuda":
            raise TransferUnavailable("cuda_ipc: the KV pages of this rank are not on a GPU")
        super().__init__(memory, "cuda_ipc", _PIECE_BYTES)
        self._device = memory.pages.device
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

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def _map(self, peer: Endpoint, heads: SharedHeads) -> MappedPeer:
        try:
            address = msgspec.msgpack.decode(peer.transports["cuda_ipc"], type=IpcAddress)
        except (KeyError, msgspec.DecodeError) as error:
            raise TransferUnavailable(f"cuda_ipc: {peer.host} offers no address for it: {error!r}") from error
        if len(address.handle) != HANDLE_BYTES or address.offset < 0:
            raise TransferUnavailable(f"cuda_ipc: the address that {peer.host} offers is none")
        process = open_process("cuda_ipc", address.process_id, peer)
        try:
            _check_same(address, peer)
            start, pages = self._open(address, peer)
            return MappedPeer(peer, heads, process, pages, partial(self._close, start))
        except BaseException:
            os.close(process)
            raise

    def _open(self, address: IpcAddress, peer: Endpoint) -> tuple[int, Tensor]:
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

    def _close(self, start: int) -> None:
        with torch.cuda.device(self._device):
            close_shared(start)

    def _copy(self, peer: MappedPeer, source: PageSet, targets: list[int], stop: Stop) -> None:
        """On a stream of the thread's own."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream()):
            super()._copy(peer, source, targets, stop)

    def _stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._streams, "mine", None)
        if stream is None:
            stream = self._streams.mine = torch.cuda.Stream(self._device)
        return stream


def _check_same(address: IpcAddress, peer: Endpoint) -> None:
    """Raises PeerGone when the process of that number, which is held open, is not the one that told the address."""
    try:
        is_same = _started(address.process_id) == address.started
    except OSError:
        is_same = False
    if not is_same:
        raise PeerGone(f"cuda_ipc: process {address.process_id} of {peer.host} is another one by now")


def _started(process_id: int) -> int:
    """Clock ticks between the boot and the start of a process. Raises OSError when there is none."""
    stat = Path(f"/proc/{process_id}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the name in brackets may have spaces
