"""Lists in Redis as mailboxes: writers batch and repeat until they are heard, readers take nothing out unread.

Letters go in on the left and are read on the right. A reader looks first and trims what it has dealt with in the next
call, so a connection that breaks between the two repeats letters and never loses one; receivers drop what they have
seen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from hashlib import md5
from typing import Any

from redis.exceptions import RedisError, ResponseError

from fastdeploy.admission.link import BLOCK_S, RedisLink
from fastdeploy.admission.messages import Result, encode_results
from fastdeploy.config.admission import AdmissionConfig

Letter = tuple[str, bytes | Result, float]  # key, content, monotonic second it is void from

log = logging.getLogger("fastdeploy.scheduler")


class Writers:
    """Sends letters in order per request, `writer_batch` at most in one transaction."""

    def __init__(self, link: RedisLink, config: AdmissionConfig) -> None:
        self._link = link
        self._ttl_s = config.ttl_s
        self._batch = config.writer_batch
        self._lanes: list[asyncio.Queue[Letter]] = [asyncio.Queue() for _ in range(config.n_writers)]

    def send(self, request_id: str, key: str, content: bytes | Result) -> None:
        """Write into the list `key`, behind everything of this request that was sent before."""
        lane = int.from_bytes(md5(request_id.encode(), usedforsecurity=False).digest()[:4], "big") % len(self._lanes)
        self._lanes[lane].put_nowait((key, content, time.monotonic() + self._ttl_s))

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """To be run while letters are sent."""
        return [self._run(lane) for lane in self._lanes]

    async def flush(self, patience_s: float) -> None:
        """Wait until all is written, at most so long."""
        waits = [asyncio.ensure_future(lane.join()) for lane in self._lanes]
        await asyncio.wait(waits, timeout=patience_s)
        for wait in waits:
            wait.cancel()

    async def _run(self, lane: asyncio.Queue[Letter]) -> None:
        while True:
            batch = [await lane.get()]
            while len(batch) < self._batch and not lane.empty():
                batch.append(lane.get_nowait())
            now_s = time.monotonic()
            lists = _by_key([letter for letter in batch if letter[2] > now_s])
            if lists:
                try:
                    await self._link.persist(partial(self._write, lists))
                except ResponseError as error:
                    log.error("Redis refused %d letters: %s", len(batch), error)
            for _ in batch:
                lane.task_done()

    async def _write(self, lists: dict[str, list[bytes]]) -> None:
        async with self._link.client.pipeline(transaction=True) as pipe:
            for key, letters in lists.items():
                pipe.lpush(key, *letters)
                pipe.expire(key, int(self._ttl_s) + 1)
            await pipe.execute()


def _by_key(batch: Sequence[Letter]) -> dict[str, list[bytes]]:
    """The letters of each list in order; results that follow each other are one."""
    lists: dict[str, list[bytes]] = {}
    results: dict[str, list[Result]] = {}
    for key, content, _ in batch:
        if isinstance(content, Result):
            results.setdefault(key, []).append(content)
        else:
            lists.setdefault(key, []).append(content)
    for key, of_key in results.items():
        lists.setdefault(key, []).append(encode_results(of_key))
    return lists


async def read(link: RedisLink, key: str, batch: int, take: Callable[[bytes], None]) -> None:
    """Give every letter of the list `key` to `take`, oldest first, for ever."""
    n_read = 0
    while True:
        if not n_read:  # moving the last element to the end changes nothing: it waits for one to be there
            await link.persist(lambda: link.client.blmove(key, key, BLOCK_S, "RIGHT", "RIGHT"))

        async def look(n_done: int = n_read) -> list[bytes]:
            async with link.client.pipeline(transaction=True) as pipe:
                if n_done:
                    pipe.ltrim(key, 0, -n_done - 1)
                pipe.lrange(key, -batch, -1)
                found: list[bytes] = (await pipe.execute())[-1]
            return found

        try:
            letters = await link.call(look)
        except (OSError, TimeoutError, RedisError):
            n_read = 0  # whether it was trimmed is not known: read again
            continue
        for letter in reversed(letters):
            take(letter)
        n_read = len(letters)
