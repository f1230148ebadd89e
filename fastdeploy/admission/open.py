"""Opens the waiting room that --scheduler-name asks for."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from fastdeploy.admission.base import Engines, WaitingRoom
from fastdeploy.config.admission import AdmissionConfig
from fastdeploy.config.schema import EngineConfig

# Of the engines, and the ports at which their cores listen for those of other servers, if they do.
Opener = Callable[[Engines, Sequence[int]], WaitingRoom]


@asynccontextmanager
async def admission(
    config: AdmissionConfig, engine: EngineConfig, registry: CollectorRegistry
) -> AsyncGenerator[Opener, None]:
    """A function that makes the room once the engines serve; the room is closed at the end of the block.

    With local and dp the engines are their own waiting room. Raises ConfigError, before any engine is started, when
    Redis is needed and cannot be used.
    """
    if not config.uses_redis:
        yield lambda engines, _control_ports: engines
        return
    from fastdeploy.admission.link import RedisLink
    from fastdeploy.admission.metrics import AdmissionMetrics
    from fastdeploy.admission.pairs import published
    from fastdeploy.admission.shared import SharedRoom
    from fastdeploy.admission.splitwise import SplitwisePlacement
    from fastdeploy.admission.stealing import WorkStealing

    metrics = AdmissionMetrics(registry)
    link = RedisLink(config, metrics)
    await link.open()
    rooms: list[SharedRoom] = []

    def make(engines: Engines, control_ports: Sequence[int]) -> SharedRoom:
        room = SharedRoom(config, engine, link, engines, metrics)
        rooms.append(room)
        if config.name == "splitwise":
            ranks = engine.parallel.serves
            room.open(SplitwisePlacement(room, ranks, socket.gethostname(), published(engine, ranks, control_ports)))
        else:
            room.open(WorkStealing(room, engine.scheduler.max_seqs * len(engine.parallel.serves)))
        return room

    try:
        yield make
    finally:
        for room in rooms:
            await room.close()
        await link.close()
        registry.unregister(metrics)
