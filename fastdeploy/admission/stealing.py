"""--scheduler-name global: requests wait in the queue of the server that accepted them, and idle servers take some.

| key | type | content |
| --- | --- | --- |
| `<topic>.ins.<name>` | string, expires | the node's load table: the node is alive |
| `<topic>.req.<name>` | list | `Place` and `Cancel` letters |
| `<topic>.resp.<name>` | list | letters of results from other servers |
| `<topic>.load.<shard>` | sorted set | node name -> length of its queue |

A request that fits runs here at once and never sees Redis. Letters are taken off the right end of a queue by whoever
has room, which is atomic. The memory of the server that accepted a request is the truth about it: a letter that got
lost is written again, and one that came too late is void by its attempt number.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import random
import socket
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from typing import Any

from redis.exceptions import RedisError

from fastdeploy.admission.accepted import Entry
from fastdeploy.admission.mail import read
from fastdeploy.admission.messages import Place, decode_letter, encode_json
from fastdeploy.admission.shared import SharedRoom

_ALIVE_S = 5  # a node that says nothing for so long is dead
_BEAT_S = 1.0
_DOWN_S = 6.0  # without Redis for so long, requests on other servers are run here
_TURN_S = 0.01
_THEFT_S = 0.05  # between two looks at other queues
_N_CANDIDATES = 50
_N_SAMPLED = 10
_MOST_TABLES = 5

log = logging.getLogger("fastdeploy.scheduler")


class WorkStealing:
    """The queue of this server, and its turns at those of others. `n_slots`: requests that run at the same time."""

    def __init__(self, room: SharedRoom, n_slots: int) -> None:
        config = room.config
        self._room = room
        self._topic = config.topic
        self._n_slots = n_slots
        self._n_shards = config.n_load_shards
        self._ttl_s = config.ttl_s
        self.patience_s = _DOWN_S
        self.name = f"{_host_address()}:{uuid.uuid4().hex[:8]}"
        self._shard = shard_of(self.name, self._n_shards)
        self._queue: deque[Entry] = deque()  # own requests that wait; the truth about them, Redis has a copy
        self._reported = -1
        self._n_missing = 0  # beats in which the queue in Redis was empty and that in memory was not
        self._steady_s = time.monotonic()  # since when Redis has answered without a gap
        self._rng = random.Random()

    def place(self, entry: Entry) -> None:
        """Run it here, or let it wait where others can take it."""
        if not self._queue and self._n_free() > 0 and self._room.run_here(entry, None):
            return
        self._queue.append(entry)
        self._write(entry)

    def _write(self, entry: Entry) -> None:
        request = entry.request
        letter = encode_json(
            Place(
                request.request_id,
                request.prompt_ids,
                request.params,
                request.arrival_s,
                self.group_of(request.request_id),
                entry.attempt,
                entry.output_ids,
            )
        )
        self._room.writers.send(request.request_id, self._key("req", self.name), letter)

    def letters_to(self, node: str) -> str:
        """The list of cancellations of a server."""
        return self._key("stop", node)

    def group_of(self, request_id: str) -> str:
        """The list of results, one for all requests."""
        return self._key("resp", self.name)

    def origin_of(self, group: str) -> str:
        """The server that reads there."""
        return group.removeprefix(self._key("resp", ""))

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Take from the own queue or another's, give signs of life, read results and cancellations."""
        room = self._room
        batch = room.config.reader_batch
        return [
            self._turns(),
            self._beats(),
            read(room.link, self._key("resp", self.name), batch, room.take_results),
            read(room.link, self._key("stop", self.name), batch, lambda x: room.take_request(x, self.name, None)),
        ]

    async def leave(self) -> None:
        """Take the node's keys away."""
        await self._room.link.call(self._take_out)

    async def _take_out(self) -> None:
        async with self._room.link.client.pipeline(transaction=True) as pipe:
            pipe.zrem(self._load(self._shard), self.name)
            pipe.delete(*(self._key(kind, self.name) for kind in ("ins", "req", "stop")))
            await pipe.execute()

    def _key(self, kind: str, name: str) -> str:
        return f"{self._topic}.{kind}.{name}"

    def _load(self, shard: int) -> str:
        return f"{self._topic}.load.{shard}"

    def _n_free(self) -> int:
        return self._n_slots - sum(load.n_requests for load in self._room.engines.loads().values())

    # ---- taking --------------------------------------------------------------------------------------------------

    async def _turns(self) -> None:
        """Fill free slots: with own requests first, then with those of others that have too many."""
        stole_s = 0.0
        while True:
            await asyncio.sleep(_TURN_S)
            self._queue = deque(entry for entry in self._queue if self._waits(entry))
            n_free, link = self._n_free(), self._room.link
            if link.down_s:
                self._run_own(n_free, None)
                continue
            try:
                if self._queue and n_free > 0:
                    self._run_own(n_free, await self._pop(self.name, n_free))
                elif n_free > 0 and time.monotonic() - stole_s > _THEFT_S:
                    await self._steal(max(n_free // 2, 1))
                    stole_s = time.monotonic()
                if len(self._queue) != self._reported:
                    await self._report()
            except (RedisError, OSError, TimeoutError) as error:
                log.debug("this turn found no Redis: %s", error)

    def _waits(self, entry: Entry) -> bool:
        return not entry.nodes and self._room.accepted.entries.get(entry.request.request_id) is entry

    def _run_own(self, n_free: int, letters: list[bytes] | None) -> None:
        """Run own requests here: those of `letters`, or without Redis the oldest, as a new attempt each."""
        waiting = {(e.request.request_id, e.attempt): e for e in self._queue}
        if letters is None:
            chosen = list(waiting.values())[: max(n_free, 0)]
            for entry in chosen:
                entry.attempt += 1  # somebody may have taken the letter just before
        else:
            found = [decode_letter(letter) for letter in letters]
            chosen = [e for f in found if (e := waiting.get((f.request_id, f.attempt))) is not None]
        for entry in chosen:
            self._room.run_here(entry, None)  # one that is refused stays in the queue, and is written again

    async def _steal(self, n_most: int) -> None:
        """Take up to `n_most` requests from a server, drawn at random, whose queue is long."""
        first = self._rng.randrange(self._n_shards)
        for i in range(min(_MOST_TABLES, self._n_shards)):
            table = self._load((first + i) % self._n_shards)
            names = await self._busy(table)
            if names:
                victim = self._rng.choice(self._rng.sample(names, min(len(names), _N_SAMPLED)))
                await self._steal_from(victim, table, n_most)
                return

    async def _busy(self, table: str) -> list[str]:
        """Other servers whose queue is long."""
        least, client = self._room.config.min_load_score, self._room.link.client
        raw = await self._room.link.call(lambda: client.zrangebyscore(table, least, "+inf", 0, _N_CANDIDATES))
        return [name for name in (member.decode() for member in raw) if name != self.name]

    async def _steal_from(self, victim: str, table: str, n_most: int) -> None:
        link = self._room.link
        if not await link.call(lambda: link.client.exists(self._key("ins", victim))):
            await self._bury(table, victim)
            return
        letters = await self._pop(victim, n_most)
        for letter in letters:
            self._room.take_request(letter, self.name, None)
        self._room.metrics.stolen += len(letters)

    async def _pop(self, name: str, n_most: int) -> list[bytes]:
        """The oldest letters of a queue, which are nobody else's from now on."""
        link, key = self._room.link, self._key("req", name)
        letters: list[bytes] | None = await link.call(lambda: link.client.rpop(key, n_most))
        return letters or []

    async def _bury(self, table: str, name: str) -> None:
        """Nobody could read the answers to a dead server's requests."""
        client = self._room.link.client
        await self._room.link.call(lambda: client.zrem(table, name))
        await self._room.link.call(lambda: client.delete(self._key("req", name)))

    # ---- signs of life -------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """The length of the queue, and that this node is alive."""
        n_queued, link = len(self._queue), self._room.link

        async def write() -> None:
            async with link.client.pipeline(transaction=True) as pipe:
                pipe.zadd(self._load(self._shard), {self.name: n_queued})
                pipe.set(self._key("ins", self.name), self._load(self._shard), ex=_ALIVE_S)
                await pipe.execute()

        await link.call(write)
        self._reported = n_queued
        self._room.metrics.reports += 1
        self._room.metrics.load_of_node = {self.name: n_queued}

    async def _beats(self) -> None:
        """Notice dead servers, lost letters, and a Redis that was started anew."""
        room, link = self._room, self._room.link
        while True:
            began_s = time.monotonic()
            try:
                if not await link.call(link.beat):
                    room.lose_remote("Redis was started anew and may have lost it")
                await self._report()
                await self._find_dead()
                await self._find_lost()
            except (RedisError, OSError, TimeoutError):
                self._steady_s = time.monotonic()
            await asyncio.sleep(_BEAT_S)
            if time.monotonic() - began_s > 2 * _BEAT_S:
                self._steady_s = time.monotonic()  # others had as little chance to say that they are alive

    async def _find_dead(self) -> None:
        """Servers that run something for this one, or for which this one runs something, and are silent."""
        names = {node for entry in self._room.accepted.remote() for node in entry.nodes}
        names |= {self.origin_of(e.group) for e in self._room.executions.alive.values()}
        if not names or time.monotonic() - self._steady_s < _ALIVE_S:
            return
        ordered, link = sorted(names), self._room.link
        keys = [self._key("ins", name) for name in ordered]
        alive = await link.call(lambda: link.client.mget(keys))
        dead = {name for name, value in zip(ordered, alive, strict=True) if value is None}
        if dead:
            self._room.lose_nodes(dead)

    async def _find_lost(self) -> None:
        """Requests that wait here, while their letters are gone and nobody has said that it took them."""
        link, key = self._room.link, self._key("req", self.name)
        n_letters = await link.call(lambda: link.client.llen(key))
        self._n_missing = self._n_missing + 1 if self._queue and not n_letters else 0
        if self._n_missing >= 3:
            self._n_missing = 0
            for entry in self._queue:
                entry.attempt += 1
                self._write(entry)


def shard_of(name: str, n_shards: int) -> int:
    """The load table of a node: CRC-16 (CCITT-FALSE) of its name."""
    return binascii.crc_hqx(name.encode(), 0xFFFF) % n_shards


def _host_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "host"
