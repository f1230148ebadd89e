"""Typed, authenticated messages over ZMQ: between front ends and an engine core, and between the cores of a group.

Who serves binds an address in Linux' abstract namespace: no file is left behind and nothing outside this host can reach
it. (A group over several machines binds a TCP port.) CURVE encrypts; only who was told the server's public key by the
common parent can connect.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from fastdeploy.wire.control import OfferEvent, WantCommand
from fastdeploy.wire.group import GroupCommand, GroupEvent
from fastdeploy.wire.messages import Command, Event

Received = TypeVar("Received")

_encode = msgspec.msgpack.Encoder().encode
_decode_event = msgspec.msgpack.Decoder(Event).decode
_decode_offer = msgspec.msgpack.Decoder(OfferEvent).decode
_decode_group_event = msgspec.msgpack.Decoder(GroupEvent).decode


def new_endpoint() -> str:
    """A local address nobody else has."""
    return f"ipc://@fastdeploy-{secrets.token_hex(16)}"


def new_keys() -> tuple[bytes, bytes]:
    """(public, secret) CURVE key pair, Z85 text."""
    public, secret = zmq.curve_keypair()
    return public, secret


class _ServerChannel(Generic[Received]):
    """The end that many connect to: one socket for all of them. Raises ZMQError when the endpoint is taken."""

    def __init__(
        self, endpoint: str, secret_key: bytes, public_key: bytes, decoder: msgspec.msgpack.Decoder[Received]
    ) -> None:
        self._decode = decoder.decode
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.curve_server = True
        self.socket.curve_secretkey = secret_key
        self.socket.curve_publickey = public_key
        self.socket.linger = 1000
        self.socket.sndhwm = self.socket.rcvhwm = 0  # never drop: the number of requests is bounded by admission
        self.socket.router_mandatory = True
        self.socket.bind(endpoint)

    def receive_all(self) -> Iterator[tuple[bytes, Received]]:
        """(sender, message) for all that has arrived; does not wait."""
        while True:
            try:
                client, *parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for data in parts:
                yield client, self._decode(data)

    def send(self, client: bytes, event: Any) -> bool:
        """Send to one of those who have spoken; False when it is gone."""
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


class CoreChannel(_ServerChannel[Command]):
    """The core's end of the talk with its front ends."""

    def __init__(self, endpoint: str, secret_key: bytes, public_key: bytes) -> None:
        super().__init__(endpoint, secret_key, public_key, msgspec.msgpack.Decoder(Command))


class HubChannel(_ServerChannel[GroupCommand]):
    """The hub's end of the talk with the engine cores of its group."""

    def __init__(self, endpoint: str, secret_key: bytes, public_key: bytes) -> None:
        super().__init__(endpoint, secret_key, public_key, msgspec.msgpack.Decoder(GroupCommand))


class ControlChannel(_ServerChannel[WantCommand]):
    """A prefill core's end of the talk with decode cores."""

    def __init__(self, host: str, port: int, secret_key: bytes, public_key: bytes) -> None:
        """Port 0 is any free one; `port` says which it is."""
        shown = f"[{host}]" if ":" in host else host
        endpoint = f"tcp://{shown}:{port or '*'}"
        super().__init__(endpoint, secret_key, public_key, msgspec.msgpack.Decoder(WantCommand))
        self.port = int(self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0").rpartition(":")[2])


class PrefillChannel:
    """A decode core's end of the talk with one prefill core. Connects again when that is replaced."""

    def __init__(self, context: zmq.Context[Any], host: str, port: int, public_key: bytes) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.curve_serverkey = public_key
        self.socket.curve_publickey, self.socket.curve_secretkey = zmq.curve_keypair()
        self.socket.linger = 0
        self.socket.reconnect_ivl_max = 1000
        self.socket.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")

    def send(self, command: WantCommand) -> None:
        """Send one message; dropped when the peer has not been there for long, which its silence tells as well."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(_encode(command), zmq.NOBLOCK)

    def receive_all(self) -> Iterator[OfferEvent]:
        """All that has arrived; does not wait."""
        while True:
            try:
                data = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield _decode_offer(data)


class MemberChannel:
    """An engine core's end of the talk with its group's hub. Connects again when the hub is replaced."""

    def __init__(self, endpoint: str, hub_public_key: bytes) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.curve_serverkey = hub_public_key
        self.socket.curve_publickey, self.socket.curve_secretkey = zmq.curve_keypair()
        self.socket.linger = 1000
        self.socket.reconnect_ivl_max = 1000
        self.socket.connect(endpoint)

    def send(self, command: GroupCommand) -> None:
        """Send one message; dropped when the hub has not been there for long, which its silence tells as well."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(_encode(command), zmq.NOBLOCK)

    def receive_all(self) -> Iterator[GroupEvent]:
        """All that has arrived; does not wait."""
        while True:
            try:
                data = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield _decode_group_event(data)

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

    async def send(self, *commands: Any) -> None:
        """Send commands that arrive together: the core takes in all of them before it plans a step."""
        await self._socket.send_multipart([_encode(command) for command in commands])

    async def receive(self) -> Any:
        """The next event."""
        return _decode_event(await self._socket.recv())

    def close(self) -> None:
        """Close at once."""
        self._socket.close()
        self._context.term()
