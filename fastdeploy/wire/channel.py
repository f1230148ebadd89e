"""Typed, authenticated messages between front ends and an engine core, over ZMQ.

The core binds an address in Linux' abstract namespace: no file is left behind and nothing outside this host can reach
it. CURVE encrypts it; only who was told the core's public key by the common parent can connect.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from fastdeploy.wire.messages import Command, Event

_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Command).decode
_decode_event = msgspec.msgpack.Decoder(Event).decode


def new_endpoint() -> str:
    """A local address nobody else has."""
    return f"ipc://@fastdeploy-{secrets.token_hex(16)}"


def new_keys() -> tuple[bytes, bytes]:
    """(public, secret) CURVE key pair, Z85 text."""
    public, secret = zmq.curve_keypair()
    return public, secret


class CoreChannel:
    """The core's end: one socket for all front ends."""

    def __init__(self, endpoint: str, secret_key: bytes, public_key: bytes) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.curve_server = True
        self.socket.curve_secretkey = secret_key
        self.socket.curve_publickey = public_key
        self.socket.linger = 1000
        self.socket.sndhwm = self.socket.rcvhwm = 0  # never drop: the number of requests is bounded by admission
        self.socket.router_mandatory = True
        self.socket.bind(endpoint)

    def receive_all(self) -> Iterator[tuple[bytes, Any]]:
        """(front end, command) for all that has arrived; does not wait."""
        while True:
            try:
                client, data = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield client, _decode_command(data)

    def send(self, client: bytes, event: Any) -> bool:
        """Send an event to one front end; False when that front end is gone."""
        try:
            self.socket.send_multipart((client, _encode(event)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Send what is queued (at most a second) and close."""
        self.socket.close()
        self._context.term()


class FrontEndChannel:
    """A front end's end, for use on one asyncio loop."""

    def __init__(self, endpoint: str, core_public_key: bytes) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_serverkey = core_public_key
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.connect(endpoint)

    async def send(self, command: Any) -> None:
        """Send one command."""
        await self._socket.send(_encode(command))

    async def receive(self) -> Any:
        """The next event."""
        return _decode_event(await self._socket.recv())

    def close(self) -> None:
        """Close at once."""
        self._socket.close()
        self._context.term()
