"""Reads of pages of another machine through NIXL over UCX: RDMA, or whatever else UCX finds between the two.

Threads read into a staging buffer and copy from there into the pages, checking on the way. So a read that comes after
its deadline never reaches a page, also where the network card cannot be told to stop. UCX itself asks nobody for a
proof: who has the metadata in an Endpoint can read the pages, so it travels over authenticated channels only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from fastdeploy.errors import PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.checks import expected_checks, verify
from fastdeploy.transfer.layout import WORD_BYTES, SharedHeads, head_runs, shared_heads
from fastdeploy.transfer.machine import rdma_devices
from fastdeploy.transfer.memory import PageMemory, copy_pages
from fastdeploy.transfer.pool import N_THREADS, PooledTransport, PoolPull, Stop

log = logging.getLogger("fastdeploy.transfer")

_SLOT_BYTES = 4 << 20
_SLOTS_PER_THREAD = 4
_TCP_SEGMENT = "256k"  # UCX's own 8 KiB halve the speed of reads over TCP
_PAUSE_S = 50e-6  # NIXL's own thread needs the processor more than one that only looks


class NixlAddress(msgspec.Struct, frozen=True, array_like=True):
    """What a reader needs: NIXL's metadata, and where the pages lie in the owner's memory."""

    metadata: bytes
    address: int
    device: int


@dataclass(eq=False, slots=True)
class NixlPeer:
    """Implements Peer."""

    endpoint: Endpoint
    heads: SharedHeads
    address: NixlAddress
    connected: bool = True


@dataclass(slots=True)
class _Flight:
    """A read under way into a slot: pages `piece` of a layer, which is number `index` of the page set."""

    handle: Any
    slot: Tensor
    index: int
    piece: slice


@dataclass(slots=True)
class _Read:
    """One pull, as its thread sees it."""

    peer: NixlPeer
    source: PageSet
    targets: list[int]
    flights: deque[_Flight] = field(default_factory=deque)


class NixlTransport(PooledTransport[NixlPeer]):
    """Implements Transport. Raises TransferUnavailable when NIXL is not installed or does not start."""

    def __init__(self, memory: PageMemory, owner: str, host: str, port: int) -> None:
        del host, port  # UCX finds its own; its metadata tells the peer
        super().__init__(memory, "nixl")
        on_gpu = memory.pages.device.type == "cuda"
        self._kind = "VRAM" if on_gpu else "DRAM"
        self._device = memory.pages.device.index or 0 if on_gpu else 0
        set_network_devices()
        for name in ("UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE"):
            os.environ.setdefault(name, _TCP_SEGMENT)
        self._agent, self._errors = _start_agent(owner)
        self._connect_errors: tuple[type[Exception], ...] = (KeyError, msgspec.DecodeError, *self._errors)
        self._lock = threading.Lock()
        n_slots = N_THREADS * _SLOTS_PER_THREAD
        slot_bytes = max(_SLOT_BYTES, memory.layout.page_bytes)
        staging = torch.empty(n_slots, slot_bytes, dtype=torch.uint8, device=memory.pages.device)
        self._free = list(staging.unbind())
        try:
            self._registered = [self._register(memory.pages), self._register(staging)]
            metadata = self._agent.get_agent_metadata()
        except self._errors as error:
            raise TransferUnavailable(f"nixl: the KV pages cannot be registered: {error}") from error
        self._address = NixlAddress(metadata, memory.pages.data_ptr(), self._device)

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def connect(self, peer: Endpoint) -> NixlPeer:
        known = self._peers.get(peer.owner)
        if known is None:
            heads = shared_heads(self._memory.layout, peer.layout)
            try:
                address = msgspec.msgpack.decode(peer.transports["nixl"], type=NixlAddress)
                name = self._agent.add_remote_agent(address.metadata)
            except self._connect_errors as error:
                raise TransferUnavailable(f"nixl: {peer.host} offers no address for it: {error!r}") from error
            if (name.decode() if isinstance(name, bytes) else name) != peer.owner:
                self._agent.remove_remote_agent(name)
                raise PeerGone(f"nixl: the metadata of {peer.host} is of {name}, not of {peer.owner}")
            known = self._peers[peer.owner] = NixlPeer(peer, heads, address)
        return known

    def pull(self, peer: NixlPeer, source: PageSet, page_ids: Sequence[int], deadline_s: float) -> PoolPull:
        if not peer.connected:
            raise PeerGone(f"nixl: the rank of {peer.endpoint.host} was disconnected")
        read = _Read(peer, source, list(page_ids))
        return self._pool.start(peer, source, read.targets, deadline_s, partial(self._run, read))

    def disconnect(self, peer: NixlPeer) -> None:
        if self._peers.pop(peer.endpoint.owner, None) is None:
            return
        peer.connected = False
        self._pool.cancel_of(peer)
        try:
            self._agent.remove_remote_agent(peer.endpoint.owner)
        except self._errors as error:
            log.info("nixl: %s is forgotten, though it was not closed well: %s", peer.endpoint.host, error)

    def close(self) -> None:
        super().close()
        for registered in self._registered:
            self._agent.deregister_memory(registered)

    def _register(self, memory: Tensor) -> Any:
        return self._agent.register_memory([(memory.data_ptr(), memory.nbytes, self._device, "")], self._kind)

    def _run(self, read: _Read, stop: Stop) -> None:
        """Keep some reads under way, and copy what has come; on a thread of the pool."""
        pieces = deque(self._pieces(read))
        try:
            while pieces or read.flights:
                stop.check()
                while pieces and len(read.flights) < _SLOTS_PER_THREAD and (slot := self._take_slot()) is not None:
                    self._launch(read, slot, *pieces.popleft())
                if not read.flights or not self._has_landed(read.flights[0]):
                    time.sleep(_PAUSE_S)
                    continue
                flight = read.flights.popleft()
                try:
                    self._unload(read, flight)
                finally:
                    self._put_slot(flight.slot)
        except self._errors as error:
            raise PeerGone(f"nixl: reading from {read.peer.endpoint.host} failed: {error}; has it ended?") from error
        finally:
            for flight in read.flights:
                self._abandon(flight)

    def _pieces(self, read: _Read) -> Iterator[tuple[int, slice]]:
        bytes_per_page = 2 * read.peer.heads.n_heads * self._memory.layout.block_bytes
        n_piece = max(1, _SLOT_BYTES // bytes_per_page)
        for index in range(read.source.n_layers):
            for first in range(0, len(read.targets), n_piece):
                yield index, slice(first, first + n_piece)

    def _launch(self, read: _Read, slot: Tensor, index: int, piece: slice) -> None:
        source, heads, address = read.source, read.peer.heads, read.peer.address
        theirs = read.peer.endpoint.layout
        layer = source.first_layer + index
        remote, local, at = [], [], slot.data_ptr()
        for first, n_bytes in head_runs(theirs, layer, source.page_ids[piece], heads.first_theirs, heads.n_heads):
            remote.append((address.address + first, n_bytes, address.device))
            local.append((at, n_bytes, self._device))
            at += n_bytes
        remote_kind = "VRAM" if read.peer.endpoint.device == "cuda" else "DRAM"
        try:
            here, there = (
                self._agent.get_xfer_descs(descs, kind) for descs, kind in ((local, self._kind), (remote, remote_kind))
            )
            flight = _Flight(
                self._agent.initialize_xfer("READ", here, there, read.peer.endpoint.owner), slot, index, piece
            )
        except BaseException:
            self._put_slot(slot)
            raise
        read.flights.append(flight)  # before it starts, so that it is given up when it fails
        self._agent.transfer(flight.handle)

    def _has_landed(self, flight: _Flight) -> bool:
        """Raises one of NIXL's errors, or PeerGone for a read that has failed."""
        state = self._agent.check_xfer_state(flight.handle)
        if state == "ERR":
            raise PeerGone("nixl: a read failed; the peer has ended or the network is broken")
        return bool(state == "DONE")

    def _unload(self, read: _Read, flight: _Flight) -> None:
        heads, layout, source, piece = read.peer.heads, self._memory.layout, read.source, flight.piece
        flight.handle.release()
        layer, targets = source.first_layer + flight.index, read.targets[piece]
        n_words = layout.block_bytes // WORD_BYTES
        words = flight.slot.view(torch.int64)[: len(targets) * 2 * heads.n_heads * n_words]
        from_p2hW = words.view(len(targets), 2, heads.n_heads, n_words)
        device = self._memory.pages.device
        from_ids = torch.arange(len(targets), device=device)
        to_ids = torch.tensor(targets, dtype=torch.int64, device=device)
        found_nh = copy_pages(from_p2hW, from_ids, self._memory.heads(layer, heads.first_mine, heads.n_heads), to_ids)
        expected_lnh = expected_checks(source, read.peer.endpoint.layout.n_kv_heads, heads)
        host = read.peer.endpoint.host
        verify(found_nh, expected_lnh[flight.index, piece], source, layer, source.page_ids[piece], host)

    def _abandon(self, flight: _Flight) -> None:
        """Give up a read. Where it cannot be stopped, its slot is given up with it."""
        try:
            flight.handle.release()
        except self._errors as error:
            log.warning("nixl: %s bytes of the staging buffer are lost to a read without end: %s", _SLOT_BYTES, error)
        else:
            self._put_slot(flight.slot)

    def _take_slot(self) -> Tensor | None:
        with self._lock:
            return self._free.pop() if self._free else None

    def _put_slot(self, slot: Tensor) -> None:
        with self._lock:
            self._free.append(slot)


def set_network_devices() -> None:
    """Tell UCX which RDMA devices to use: those of KVCACHE_RDMA_NICS, unless UCX_NET_DEVICES is set by hand.

    UCX reads the environment, so this is where that is written. Raises TransferUnavailable for a name there is not.
    """
    if os.environ.get("UCX_NET_DEVICES"):
        return
    there = rdma_devices()
    asked = [name for name in os.environ.get("KVCACHE_RDMA_NICS", "").split(",") if name]
    missing = [name for name in asked if name not in there]
    if missing and there:
        raise TransferUnavailable(
            f"KVCACHE_RDMA_NICS: {', '.join(missing)} is no RDMA device of this machine that is up; there are "
            f"{', '.join(there)}"
        )
    if not there:
        log.warning("nixl: this machine has no RDMA device that is up, KV pages travel over TCP, which is slower")
    elif asked:
        os.environ["UCX_NET_DEVICES"] = ",".join(f"{name}:1" for name in asked)


def _start_agent(owner: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """(NIXL's agent with UCX, the errors that NIXL raises)."""
    try:
        import nixl  # an optional package, and slow to load
    except ImportError as error:
        raise TransferUnavailable(
            f"nixl cannot be loaded: {error}; pip install 'fastdeploy[pd]', with CUDA 13: pip install nixl nixl-cu13"
        ) from error
    named = {name: getattr(nixl._bindings, name) for name in dir(nixl._bindings) if name.endswith("Error")}
    errors: tuple[type[Exception], ...] = tuple(
        kind for kind in named.values() if isinstance(kind, type) and issubclass(kind, Exception)
    )
    # Two threads use the agent; NIXL's own thread answers peers while nobody calls.
    config = nixl._api.nixl_agent_config(
        enable_prog_thread=True, backends=["UCX"], sync_mode=nixl._api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    )
    start_errors: tuple[type[Exception], ...] = (RuntimeError, *errors)
    try:
        agent = nixl._api.nixl_agent(owner, config)
    except start_errors as error:
        raise TransferUnavailable(f"nixl: UCX does not start: {error}; UCX_LOG_LEVEL=info tells more") from error
    return agent, errors
