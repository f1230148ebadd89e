"""Places the requests of one front end on its data-parallel ranks, and moves queued ones when a rank falls behind."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import EngineError, EngineUnavailable
from fastdeploy.frontend.client import Sink
from fastdeploy.frontend.ledger import RankLoad, balance_ratio, least_loaded
from fastdeploy.frontend.replica import Replica
from fastdeploy.wire.messages import GroupAddress, LoadProgress, Ready, Status, Submit, TokenDelta

log = logging.getLogger("fastdeploy.coordinator")


class Coordinator:
    """All engine cores behind one front end, which to its callers are one engine.

    `on_status` gets the last Status of every rank that has reported, whenever one reports.
    """

    def __init__(
        self,
        config: EngineConfig,
        group: GroupAddress | None,
        on_status: Callable[[dict[int, Status]], None],
        *,
        restart: bool,
        pinned: bool = False,
    ) -> None:
        """With `pinned` a queued request stays with the rank it was given to."""
        self._limits = config.scheduler
        self._shares_experts = group is not None
        self._on_status = on_status
        self._pinned = pinned
        self._status: dict[int, Status] = {}
        self._home: dict[str, Replica] = {}  # of each request that is alive
        self._n_cache_tokens = 1
        self._page_tokens = config.cache.page_tokens
        self.replicas = [
            Replica(
                replace(config, parallel=replace(config.parallel, data_rank=data_rank)),
                group,
                partial(self._take_status, data_rank),
                self._place_again,
                restart=restart,
            )
            for data_rank in config.parallel.serves
        ]

    async def start(self, on_progress: Callable[[LoadProgress], None]) -> Ready:
        """Bring all up; the sums of what they have, and the slowest's seconds. Raises the first error of any."""
        tasks = [
            asyncio.create_task(replica.start(on_progress if i == 0 else _ignore))
            for i, replica in enumerate(self.replicas)
        ]
        try:
            readies = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        self._n_cache_tokens = min(ready.n_pages for ready in readies) * self._page_tokens
        stages_s: defaultdict[str, float] = defaultdict(float)
        for ready in readies:
            for stage, seconds in ready.stages_s.items():
                stages_s[stage] = max(stages_s[stage], seconds)
        return Ready(
            sum(ready.n_pages for ready in readies),
            sum(ready.kv_bytes for ready in readies),
            sum(ready.weight_bytes for ready in readies),
            dict(stages_s),
            self._introduce(readies),
        )

    def _introduce(self, readies: Sequence[Ready]) -> list[int]:
        """Tell the cores where the others listen for those of other servers; returns all these ports."""
        ports = [port for ready in readies for port in ready.control_ports]
        if len(ports) > 1:
            for replica in self.replicas:
                replica.introduce(ports)
        return ports

    def submit(self, requests: Iterable[Submit], inbox: Sink) -> None:
        """Send each request to the rank that it names, or to the one with the least to do.

        Raises EngineUnavailable when none serves.
        """
        for request in requests:
            replica = self._choose(request)
            replica.submit(request, inbox)
            self._home[request.request_id] = replica

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests that still run; their inbox gets a last delta with finish reason "abort"."""
        for replica, ids in self._by_home(request_ids):
            replica.abort(ids)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Abort requests nobody reads any more, and end the books on those that are over."""
        request_ids = list(request_ids)
        for replica, ids in self._by_home(request_ids):
            replica.forget(ids)
        for request_id in request_ids:
            self._home.pop(request_id, None)

    def health(self) -> str | None:
        """None while requests are served, else what is wrong: with any rank if they share experts, or with all."""
        wrongs = [replica.health() for replica in self.replicas]
        if self._shares_experts or len(wrongs) == 1:
            return next((wrong for wrong in wrongs if wrong is not None), None)
        return wrongs[0] if all(wrong is not None for wrong in wrongs) else None

    def note(self) -> dict[str, str]:
        """Nothing besides `health`."""
        return {}

    def statuses(self) -> dict[int, Status]:
        """What each data-parallel rank told last."""
        return self._status

    def rearrange(self) -> None:
        """Ask a rank that serves to have experts moved. Raises EngineUnavailable when there is none."""
        replica = next((replica for replica in self.replicas if replica.serving), None)
        if replica is None:
            raise EngineUnavailable(f"the engine stopped: {self.replicas[0].health()}")
        replica.rearrange()

    def balance_ratio(self) -> float:
        """Mean over largest load of the ranks, in tokens."""
        return balance_ratio([replica.load for replica in self.replicas])

    async def died(self) -> EngineError:
        """Waits until a rank is gone for good and says why."""
        waits = [asyncio.create_task(replica.gone()) for replica in self.replicas]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """Stop all engines; requests that still run fail."""
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    def loads(self) -> dict[int, RankLoad]:
        """What each data-parallel rank that serves has to do."""
        return {r.config.parallel.data_rank: r.load for r in self.replicas if r.serving}

    def _choose(self, request: Submit) -> Replica:
        data_rank = request.data_rank
        may_run = [r for r in self.replicas if data_rank in (None, r.config.parallel.data_rank)]
        serving = [replica for replica in may_run if replica.serving]
        if not may_run:
            raise EngineUnavailable(f"data-parallel rank {data_rank} is not behind this server")
        if not serving:
            raise EngineUnavailable(f"the engine stopped: {may_run[0].health()}")
        if len(serving) == 1:
            return serving[0]
        limits = self._limits
        loads = [replica.load for replica in serving]
        sizes = limits.max_seqs, limits.max_batched_tokens, self._n_cache_tokens
        return serving[least_loaded(loads, request, *sizes)]

    def _take_status(self, data_rank: int, status: Status) -> None:
        self._status[data_rank] = status
        if len(self.replicas) > 1 and not self._pinned:
            self._even_out()
        self._on_status(self._status)

    def _even_out(self) -> None:
        """Ask ranks whose requests queue for some of them back, as many as others could start at once."""
        room = 0
        for replica in self.replicas:
            status = self._status.get(replica.config.parallel.data_rank)
            if replica.serving and status is not None and status.n_waiting == 0:
                room += max(self._limits.max_seqs - replica.load.n_requests, 0)
        for replica in self.replicas:
            status = self._status.get(replica.config.parallel.data_rank)
            if room and replica.serving and status is not None and status.n_waiting:
                n_moved = min(status.n_waiting, room)
                replica.withdraw(n_moved)
                room -= n_moved

    def _place_again(self, requests: list[tuple[Submit, Sink]]) -> None:
        """Requests that a rank gave back go to whichever now has the least to do."""
        for request, inbox in requests:
            try:
                self.submit([request], inbox)
            except EngineUnavailable as error:
                kind = type(error).__name__
                inbox.put(TokenDelta(request.request_id, [], "error", error=error.message, error_kind=kind))

    def _by_home(self, request_ids: Iterable[str]) -> Iterable[tuple[Replica, list[str]]]:
        found: defaultdict[Replica, list[str]] = defaultdict(list)
        for request_id in request_ids:
            if (home := self._home.get(request_id)) is not None:
                found[home].append(request_id)
        return found.items()


def _ignore(_: LoadProgress) -> None:
    """Only one replica's progress is shown; they load side by side."""
