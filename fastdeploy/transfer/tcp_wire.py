"""What the TCP transport sends: the proof that both sides know the owner's key, requests, and pages out of memory.

The key travels inside Endpoint, over an authenticated channel. Both sides prove that they know it by a keyed hash of
two fresh random numbers. Pages are sent in the clear.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Iterator, Sequence

import msgspec

from fastdeploy.transfer.layout import PageLayout, head_runs

KEY_BYTES = 32
_NONCE_BYTES, _PROOF_BYTES = 32, 32
_MAX_VIEWS = 512  # pieces of memory in one system call; Linux allows 1024
_MAX_REQUEST_BYTES = 16 << 20
_MAX_TEXT_BYTES = 4096


class HandshakeError(Exception):
    """The other side does not know the key."""


class ReadRequest(msgspec.Struct, frozen=True, array_like=True):
    """Ask for a run of heads of these pages, of a run of layers."""

    page_ids: list[int]
    first_layer: int
    n_layers: int
    first_head: int
    n_heads: int

    def problem(self, layout: PageLayout) -> str:
        """What of it the owner of such pages does not have; empty when it has all."""
        pages, layers, heads = layout.n_pages, layout.n_layers, layout.n_kv_heads
        if self.page_ids and not 0 <= min(self.page_ids) <= max(self.page_ids) < pages:
            return f"page ids must be from 0 to {pages - 1}"
        if self.first_layer < 0 or self.n_layers < 1 or self.first_layer + self.n_layers > layers:
            return f"layers {self.first_layer} + {self.n_layers} are more than the {layers} there are"
        if self.first_head < 0 or self.n_heads < 1 or self.first_head + self.n_heads > heads:
            return f"heads {self.first_head} + {self.n_heads} are more than the {heads} there are"
        return ""


_decode_request = msgspec.msgpack.Decoder(ReadRequest).decode


def prove_as_server(connection: socket.socket, key: bytes) -> None:
    """Raises HandshakeError, OSError or EOFError."""
    mine = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(mine)
    answer = receive(connection, _NONCE_BYTES + _PROOF_BYTES)
    theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"reader", mine, theirs)):
        raise HandshakeError("the reader does not know the key of these pages")
    connection.sendall(_proof(key, b"owner", mine, theirs))


def prove_as_client(connection: socket.socket, key: bytes) -> None:
    """Raises HandshakeError, OSError or EOFError."""
    theirs, mine = receive(connection, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(mine + _proof(key, b"reader", theirs, mine))
    if not hmac.compare_digest(receive(connection, _PROOF_BYTES), _proof(key, b"owner", theirs, mine)):
        raise HandshakeError("who listens there does not know the key of these pages")


def send_request(connection: socket.socket, request: ReadRequest) -> None:
    """Raises OSError."""
    body = msgspec.msgpack.encode(request)
    connection.sendall(len(body).to_bytes(4, "little") + body)


def receive_request(connection: socket.socket) -> ReadRequest:
    """Raises OSError, EOFError, or ValueError for what is no request."""
    n_bytes = int.from_bytes(receive(connection, 4), "little")
    if n_bytes > _MAX_REQUEST_BYTES:
        raise ValueError(f"a request of {n_bytes} bytes; the limit is {_MAX_REQUEST_BYTES}")
    try:
        return _decode_request(receive(connection, n_bytes))
    except msgspec.DecodeError as error:
        raise ValueError(f"no request: {error}") from error


def send_status(connection: socket.socket, problem: str) -> None:
    """Before the pages: empty text means that they follow, else nothing does. Raises OSError."""
    text = problem.encode()[:_MAX_TEXT_BYTES]
    connection.sendall(len(text).to_bytes(4, "little") + text)


def receive_status(connection: socket.socket) -> str:
    """What `send_status` sent. Raises OSError, EOFError."""
    n_bytes = int.from_bytes(receive(connection, 4), "little")
    return receive(connection, min(n_bytes, _MAX_TEXT_BYTES)).decode(errors="replace")


def receive(connection: socket.socket, n_bytes: int) -> bytes:
    """So many bytes. Raises OSError, and EOFError when the connection ends before."""
    data = bytearray(n_bytes)
    view = memoryview(data)
    while view:
        n = connection.recv_into(view)
        if n == 0:
            raise EOFError("the connection was closed")
        view = view[n:]
    return bytes(data)


def page_views(
    memory: memoryview, layout: PageLayout, layer: int, page_ids: Sequence[int], first_head: int, n_heads: int
) -> list[memoryview]:
    """The memory of what `head_runs` names; `memory`: all pages of the rank, as bytes."""
    runs = head_runs(layout, layer, page_ids, first_head, n_heads)
    return [memory[first : first + n_bytes] for first, n_bytes in runs]


def send_views(connection: socket.socket, views: Sequence[memoryview]) -> None:
    """Send memory as it lies. Raises OSError."""
    for batch in _batches(views):
        left = batch
        while left:
            left = _after(left, connection.sendmsg(left))


def receive_views(connection: socket.socket, views: Sequence[memoryview]) -> None:
    """Fill memory. Raises OSError, EOFError."""
    for batch in _batches(views):
        left = batch
        while left:
            n = connection.recvmsg_into(left)[0]
            if n == 0:
                raise EOFError("the connection was closed")
            left = _after(left, n)


def _batches(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    for first in range(0, len(views), _MAX_VIEWS):
        yield list(views[first : first + _MAX_VIEWS])


def _after(views: list[memoryview], n_bytes: int) -> list[memoryview]:
    """What is left of the views behind their first n_bytes."""
    for index, view in enumerate(views):
        if n_bytes < len(view):
            return [view[n_bytes:], *views[index + 1 :]]
        n_bytes -= len(view)
    return []


def _proof(key: bytes, role: bytes, owner_nonce: bytes, reader_nonce: bytes) -> bytes:
    return hmac.digest(key, role + owner_nonce + reader_nonce, "sha256")
