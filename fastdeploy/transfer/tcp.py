"""Reads of pages of another machine over TCP, where there is no RDMA. Pages in host memory only.

Pages go from the owner's memory into the socket and from the socket into the reader's pages, without a copy between.
Connections are opened by the threads that read, at the first pull, and kept; the rank never waits for the network.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from fastdeploy.errors import LayoutMismatch, PeerGone, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.checks import expected_checks, verify
from fastdeploy.transfer.layout import SharedHeads, shared_heads
from fastdeploy.transfer.memory import PageMemory, copy_pages
from fastdeploy.transfer.pool import PooledTransport, PoolPull, Stop
from fastdeploy.transfer.tcp_server import TcpServer, set_options
from fastdeploy.transfer.tcp_wire import (
    HandshakeError,
    ReadRequest,
    page_views,
    prove_as_client,
    receive_status,
    receive_views,
    send_request,
)

_PIECE_BYTES = 1 << 20  # checked while it is in the caches
_CONNECT_S = 5.0


class TcpAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the owner listens, and the key that its readers must know."""

    host: str
    port: int
    key: bytes


@dataclass(eq=False, slots=True)
class TcpPeer:
    """Implements Peer. `idle`: connections that no thread uses; None after the peer was disconnected."""

    endpoint: Endpoint
    heads: SharedHeads
    address: TcpAddress
    lock: threading.Lock = field(default_factory=threading.Lock)
    idle: list[socket.socket] | None = field(default_factory=list)


class TcpTransport(PooledTransport[TcpPeer]):
    """Implements Transport. Raises TransferUnavailable when the pages are not in host memory."""

    def __init__(self, memory: PageMemory, owner: str, host: str, port: int) -> None:
        if memory.pages.device.type != "cpu":
            raise TransferUnavailable("tcp: the KV pages of this rank are on a GPU; use nixl, which can send them")
        super().__init__(memory, "tcp")
        self._bytes = memory.pages.view(-1).numpy().data
        self._server = TcpServer(self._bytes, memory.layout, host, port)
        self._address = TcpAddress(host, self._server.port, self._server.key)

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def connect(self, peer: Endpoint) -> TcpPeer:
        known = self._peers.get(peer.owner)
        if known is None:
            try:
                address = msgspec.msgpack.decode(peer.transports["tcp"], type=TcpAddress)
            except (KeyError, msgspec.DecodeError) as error:
                raise TransferUnavailable(f"tcp: {peer.host} offers no address for it: {error!r}") from error
            known = TcpPeer(peer, shared_heads(self._memory.layout, peer.layout), address)
            self._peers[peer.owner] = known
        return known

    def pull(self, peer: TcpPeer, source: PageSet, page_ids: Sequence[int], deadline_s: float) -> PoolPull:
        if peer.idle is None:
            raise PeerGone(f"tcp: the rank of {peer.endpoint.host} was disconnected")
        targets = list(page_ids)
        return self._pool.start(peer, source, targets, deadline_s, partial(self._read, peer, source, targets))

    def disconnect(self, peer: TcpPeer) -> None:
        if self._peers.pop(peer.endpoint.owner, None) is not None:
            self._pool.cancel_of(peer)
            with peer.lock:
                idle, peer.idle = peer.idle or [], None
            for connection in idle:
                connection.close()

    def close(self) -> None:
        super().close()
        self._server.close()

    def _read(self, peer: TcpPeer, source: PageSet, targets: list[int], stop: Stop) -> None:
        """Fetch and check, on a thread of the pool."""
        if not targets:
            return
        heads, layout = peer.heads, self._memory.layout
        expected_lnh = expected_checks(source, peer.endpoint.layout.n_kv_heads, heads)
        request = ReadRequest(source.page_ids, source.first_layer, source.n_layers, heads.first_theirs, heads.n_heads)
        n_piece = max(1, _PIECE_BYTES // layout.page_bytes)
        to_ids = torch.tensor(targets, dtype=torch.int64)
        with _errors_of(peer, stop), self._answer(peer, request, stop) as connection:
            for index in range(source.n_layers):
                layer = source.first_layer + index
                own_p2hW = self._memory.heads(layer, heads.first_mine, heads.n_heads)
                for first in range(0, len(targets), n_piece):
                    piece = slice(first, first + n_piece)
                    views = page_views(self._bytes, layout, layer, targets[piece], heads.first_mine, heads.n_heads)
                    stop.check()
                    connection.settimeout(max(0.001, stop.left_s))
                    receive_views(connection, views)
                    found_nh = copy_pages(own_p2hW, to_ids[piece], None, None)
                    verify(
                        found_nh, expected_lnh[index, piece], source, layer, source.page_ids[piece], peer.endpoint.host
                    )

    @contextlib.contextmanager
    def _answer(self, peer: TcpPeer, request: ReadRequest, stop: Stop) -> Iterator[socket.socket]:
        """A connection on which the pages follow next; kept for the next pull when they were read to the end."""
        connection = self._ask(peer, request, stop)
        try:
            yield connection
        except BaseException:
            connection.close()  # the rest of the answer is on its way
            raise
        stop.watch(None)
        with peer.lock:
            if peer.idle is not None:
                peer.idle.append(connection)
                return
        connection.close()

    def _ask(self, peer: TcpPeer, request: ReadRequest, stop: Stop) -> socket.socket:
        while True:
            stop.check()
            with peer.lock:
                kept = peer.idle.pop() if peer.idle else None
            connection = kept or _open(peer.address, stop)
            try:
                stop.watch(connection)
                connection.settimeout(max(0.001, stop.left_s))
                send_request(connection, request)
                problem = receive_status(connection)
            except BaseException as error:
                connection.close()
                # A kept connection may have ended while nobody used it.
                if kept is not None and isinstance(error, ConnectionError | EOFError):
                    continue
                raise
            if not problem:
                return connection
            connection.close()
            raise LayoutMismatch(f"tcp: {peer.endpoint.host} refused to send pages: {problem}")


def _open(address: TcpAddress, stop: Stop) -> socket.socket:
    family, kind, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    connection = socket.socket(family, kind)
    try:
        stop.watch(connection)
        connection.settimeout(max(0.001, min(_CONNECT_S, stop.left_s)))
        connection.connect(place)
        set_options(connection)
        prove_as_client(connection, address.key)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _errors_of(peer: TcpPeer, stop: Stop) -> Iterator[None]:
    """Turn errors of the network into typed ones; those of a pull that was given up into StoppedError."""
    where = f"{peer.address.host} port {peer.address.port}"
    try:
        try:
            yield
        except (OSError, EOFError):
            stop.check()
            raise
    except TimeoutError as error:
        raise TransferUnavailable(f"tcp: {where} does not answer: {error}; check the network and firewalls") from error
    except (ConnectionError, EOFError) as error:
        raise PeerGone(f"tcp: the rank that listened at {where} has ended or the connection broke: {error}") from error
    except HandshakeError as error:
        raise PeerGone(f"tcp: {where}: {error}; another process listens there now") from error
    except OSError as error:
        raise TransferUnavailable(f"tcp: cannot reach {where}: {error}; check the network and firewalls") from error
