"""A decode core's channels to prefill cores: made when needed, closed when idle, made again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest
import zmq

from fastdeploy.engine.pairing import LOOPBACK, PrefillChannels
from fastdeploy.wire.channel import ControlChannel, new_keys
from fastdeploy.wire.control import StillHere, WhoIsThere

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def pair() -> Iterator[tuple[ControlChannel, PrefillChannels]]:
    public_key, secret_key = new_keys()
    server, channels = ControlChannel(LOOPBACK, 0, secret_key, public_key), PrefillChannels(LOOPBACK, public_key)
    yield server, channels
    channels.close()
    server.close()


def n_connections(port: int) -> int:
    connections = psutil.Process().net_connections("tcp")
    return sum(1 for one in connections if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED")


def wait_connections(port: int, n: int) -> None:
    deadline_s = time.monotonic() + 20
    while n_connections(port) != n:
        assert time.monotonic() < deadline_s, f"{n_connections(port)} connections, expected {n}"
        time.sleep(0.02)


def talk(server: ControlChannel, channels: PrefillChannels, poller: zmq.Poller, now_s: float) -> None:
    """A question and its answer, which the poller tells of."""
    address = (LOOPBACK, server.port)
    channels.send(address, WhoIsThere(), now_s)
    assert server.socket.poll(20_000)
    [(peer, command)] = server.receive_all()
    assert command == WhoIsThere()
    assert server.send(peer, StillHere("core"))
    assert poller.poll(20_000)
    assert list(channels.receive_all()) == [(address, StillHere("core"))]


def test_idle_channels_are_closed(pair: tuple[ControlChannel, PrefillChannels]) -> None:
    server, channels = pair
    poller, address = zmq.Poller(), (LOOPBACK, server.port)
    channels.register(poller)
    talk(server, channels, poller, 100.0)
    wait_connections(server.port, 1)
    assert channels.let_go(159.0, set()) == []
    assert channels.let_go(200.0, {address}) == []
    assert channels.let_go(200.0, set()) == [address]
    wait_connections(server.port, 0)
    assert poller.poll(0) == []
    talk(server, channels, poller, 201.0)
    wait_connections(server.port, 1)
