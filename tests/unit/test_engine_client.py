"""What a front end says to its engine core in one turn of its event loop arrives together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from fastdeploy.frontend.client import EngineClient, EngineProcess, Inbox
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.channel import CoreChannel, new_endpoint, new_keys
from fastdeploy.wire.messages import Abort, Command, Submit

pytestmark = pytest.mark.timeout(60)


decode_command = msgspec.msgpack.Decoder(Command).decode


async def said(channel: CoreChannel) -> list[Any]:
    """The commands of one message."""
    assert await asyncio.to_thread(channel.socket.poll, 20_000)
    _, *parts = channel.socket.recv_multipart()
    return [decode_command(part) for part in parts]


def test_requests_of_one_turn_come_together() -> None:
    public_key, secret_key = new_keys()
    channel = CoreChannel(new_endpoint(), secret_key, public_key)
    engine = SimpleNamespace(endpoint=channel.socket.last_endpoint.decode(), public_key=public_key)
    params = SamplingParams().resolved({}, 4)
    requests = [Submit(f"r{i}", [i + 1] * 200, params, 0.0) for i in range(64)]

    async def talk() -> None:
        client = EngineClient(cast(EngineProcess, engine), 60.0, lambda _: None, lambda _: None)
        for request in requests:
            client.submit(request, Inbox())
        client.abort(["r3", "nobody"])
        assert await said(channel) == [*requests, Abort(["r3"])]
        client.abort(["r4"])
        assert await said(channel) == [Abort(["r4"])]
        client._channel.close()

    try:
        asyncio.run(talk())
    finally:
        channel.close()
