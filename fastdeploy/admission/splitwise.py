"""--scheduler-name splitwise: each data-parallel rank reports its load, whoever accepts a request picks the rank.

| key | type | content |
| --- | --- | --- |
| `<topic>.cluster` | hash | node id -> `Record` |
| `ReqQ_<node id>` | list | `Place` and `Cancel` letters |
| `<node id>-<i>` | list | letters of results for reader i of the server whose first node this is |
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from fastdeploy.admission.accepted import Entry
from fastdeploy.admission.mail import read
from fastdeploy.admission.messages import Place, Record, encode_json
from fastdeploy.admission.placement import Cluster, choose, decoded, disaggregate_info
from fastdeploy.admission.shared import SharedRoom

_INTAKE = 50  # letters that a node reads at once
_FORGET_S = 60.0  # records older than that are deleted
_RETRY_S = 1.0
_IDLE_PERIOD_S = 0.05  # between looks at loads of which all are zero: looking costs more than an idle server may

log = logging.getLogger("fastdeploy.scheduler")


class SplitwisePlacement:
    """The nodes of this server, and the placing of what it accepts."""

    def __init__(
        self, room: SharedRoom, data_ranks: Iterable[int], host: str, disaggregated: Mapping[int, dict[str, Any]]
    ) -> None:
        """`disaggregated`: what each rank tells of itself to those that it is paired with; nothing if it is mixed."""
        self._room = room
        self._config = room.config
        name = uuid.uuid4().hex
        self.nodes = {f"{name}{rank}": rank for rank in data_ranks}  # node id -> data-parallel rank
        self._first = next(iter(self.nodes))
        self._host = host
        self._disaggregated = disaggregated
        self._table = f"{self._config.topic}.cluster"
        self._beat_s = self._config.expire_period_s / 4
        # Only a mixed server can answer alone.
        self.patience_s = 2 * self._config.expire_period_s if self._config.role == "mixed" else math.inf
        self._cluster = Cluster(self._config.expire_period_s)
        self._waiting: list[Entry] = []
        self._wake = asyncio.Event()
        self._reported: dict[str, int] = {}
        self._swept_s = time.monotonic()
        self._silent: dict[int | None, tuple[int, int]] = {}
        self._rng = random.Random()

    def place(self, entry: Entry) -> None:
        """Placed in the next turn, together with all that come meanwhile."""
        self._waiting.append(entry)
        self._wake.set()

    def letters_to(self, node: str) -> str:
        """The queue of a node."""
        return f"ReqQ_{node}"

    def group_of(self, request_id: str) -> str:
        """One of this server's readers, always the same for a request."""
        return f"{self._first}-{hash(request_id) % self._config.n_readers}"

    def origin_of(self, group: str) -> str:
        """The first node of the server that reads there."""
        return group.rpartition("-")[0]

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Place, report, watch, read requests and results."""
        room, link = self._room, self._room.link
        readers = [
            read(link, f"{self._first}-{i}", self._config.reader_batch, room.take_results)
            for i in range(self._config.n_readers)
        ]
        intakes = [read(link, f"ReqQ_{node}", _INTAKE, partial(self._take, node)) for node in self.nodes]
        return [self._place_all(), self._report(), self._watch(), *readers, *intakes]

    async def leave(self) -> None:
        """Nothing is placed here any more."""
        await self._room.link.call(self._take_out)

    async def _take_out(self) -> None:
        await self._room.link.client.hdel(self._table, *self.nodes)

    def _take(self, node: str, letter: bytes) -> None:
        self._room.take_request(letter, node, self.nodes[node])

    # ---- placing -------------------------------------------------------------------------------------------------

    async def _place_all(self) -> None:
        """One look at the table for all requests that wait."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._room.link.down_s:
                try:
                    await self._look()
                except (RedisError, OSError, TimeoutError):
                    log.debug("placing without a look at the table")
            waiting, self._waiting = self._waiting, []
            for entry in waiting:
                if not entry.nodes and entry.request.request_id in self._room.accepted.entries and not self._put(entry):
                    self._waiting.append(entry)
            if self._waiting:
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _look(self) -> None:
        """Read the table; nodes that were lost or have left give their requests back."""
        raw = await self._room.link.call(lambda: self._room.link.client.hgetall(self._table))
        gone = self._cluster.update(decoded(raw), time.monotonic())
        gone -= self.nodes.keys()
        if gone:
            log.warning("nodes gone: %s", ", ".join(sorted(gone)))
            self._room.lose_nodes(gone)
            for node in gone:
                self._room.metrics.placed_on.pop(node, None)

    def _put(self, entry: Entry) -> bool:
        """Give an entry to a node; False when there is none now."""
        nodes, loads = self._view()
        chosen = choose(nodes, loads, entry.n_tokens, self._rng)
        if chosen is None:
            return False
        if len(chosen) == 1 and chosen[0] in self.nodes:
            is_taken = self._room.run_here(entry, self.nodes[chosen[0]])
            self._room.metrics.placed_on[chosen[0]] += is_taken
            return is_taken
        if entry.output_ids:
            chosen = chosen[:1]  # what was generated before belongs to no prompt that prefill could compute
        info = disaggregate_info(nodes[chosen[0]], nodes[chosen[1]]) if len(chosen) == 2 else None
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
                info,
            )
        )
        entry.nodes = chosen
        for node in chosen:  # the decode node first
            self._room.writers.send(request.request_id, f"ReqQ_{node}", letter)
            self._room.metrics.placed_on[node] += 1
        self._room.metrics.placed["other"] += 1
        log.debug("(%s) to node %s", request.request_id, chosen)
        return True

    def _view(self) -> tuple[dict[str, Record], dict[str, int]]:
        """Nodes that can be chosen and their load, with what was placed and is in no report yet.

        Own nodes are known without a report, and without Redis they are all there is.
        """
        link = self._room.link
        own = self._own_loads()
        nodes = {} if link.down_s else self._cluster.schedulable(self._room.fingerprint, link.now_s())
        nodes = {n: r for n, r in nodes.items() if n not in self.nodes or n in own}
        for node, load in own.items():
            nodes[node] = self._record(node, load)
        loads = {n: own.get(n, r.load) for n, r in nodes.items()}
        for entry in self._room.accepted.remote():
            for node in entry.nodes:
                record = nodes.get(node)
                if record is not None and (entry.taken_s is None or entry.taken_s >= record.ts) and not entry.has_begun:
                    loads[node] += 1 if record.role == "decode" else entry.n_tokens
        return nodes, loads

    # ---- reporting and watching ----------------------------------------------------------------------------------

    def _own_loads(self) -> dict[str, int]:
        counted = "n_requests" if self._config.role == "decode" else "n_prompt_tokens"
        loads = self._room.engines.loads()
        silent = 1 if self._config.role == "decode" else 0
        return {
            node: max(getattr(loads[rank], counted) - self._silent.get(rank, (0, 0))[silent], 0)
            for node, rank in self.nodes.items()
            if rank in loads
        }

    def _record(self, node: str, load: int) -> Record:
        now_s, disaggregated = self._room.link.now_s(), self._disaggregated.get(self.nodes[node])
        return Record(now_s, self._config.role, load, self._host, disaggregated, self._room.fingerprint)

    async def _report(self) -> None:
        """Write loads when one has changed, at most every sync period, and as a sign of life four times an expiry."""
        written_s = 0.0
        while True:
            loads = self._own_loads()
            if loads != self._reported or time.monotonic() - written_s >= self._beat_s:
                try:
                    await self._room.link.call(partial(self._write, loads))
                    self._reported, written_s = loads, time.monotonic()
                    self._room.metrics.reports += 1
                except (RedisError, OSError, TimeoutError):
                    await asyncio.sleep(self._beat_s / 4)
            period_s = self._config.sync_period_s
            await asyncio.sleep(period_s if any(loads.values()) else max(period_s, _IDLE_PERIOD_S))

    async def _write(self, loads: dict[str, int]) -> None:
        client = self._room.link.client
        records = {node: encode_json(self._record(node, load)) for node, load in loads.items()}
        if records:
            await client.hset(self._table, mapping=records)
        absent = self.nodes.keys() - records.keys()
        if absent:
            await client.hdel(self._table, *absent)

    async def _watch(self) -> None:
        """Notice lost nodes, and a Redis that was started anew."""
        room, link = self._room, self._room.link
        forgot_s = time.monotonic()
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                if not await link.call(link.beat):
                    self._reported = {}
                    room.lose_remote("Redis was started anew and may have lost it")
                await self._look()
            except (RedisError, OSError, TimeoutError):
                continue
            now_s = time.monotonic()
            room.metrics.load_of_node = {n: r.load for n, r in self._cluster.records.items()}
            if now_s - self._swept_s > min(self._config.release_load_s, 60.0):
                self._silent, self._swept_s = room.executions.silent(self._config.release_load_s), now_s
            if now_s - forgot_s > _FORGET_S:
                forgot_s = now_s
                await self._forget_old()

    async def _forget_old(self) -> None:
        """Delete the records of nodes that went away without a word."""
        link = self._room.link
        try:
            records = decoded(await link.call(lambda: link.client.hgetall(self._table)))
            old = [n for n, r in records.items() if link.now_s() - r.ts > _FORGET_S]
            if old:
                await link.call(lambda: link.client.hdel(self._table, *old))
        except (RedisError, OSError, TimeoutError) as error:
            log.debug("old records stay for now: %s", error)
