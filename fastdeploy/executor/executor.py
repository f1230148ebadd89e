"""The engine core's hands: it starts the ranks of one replica, sends each the same plan, and takes rank 0's answer.

All ranks fail together: when one dies or reports an error, the executor raises and the core ends with that reason.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import msgspec

from fastdeploy import errors
from fastdeploy.config.hardware import cpu_rank_environment
from fastdeploy.config.schema import EngineConfig
from fastdeploy.transfer.base import Endpoint
from fastdeploy.wire.child import Child
from fastdeploy.wire.experts import ExpertReport
from fastdeploy.wire.messages import (
    GroupStore,
    JoinGroup,
    LoadProgress,
    PagesComputed,
    PullEnded,
    RankAlive,
    RankBoot,
    RankEvent,
    RankFailed,
    RankReady,
    StepPlan,
    StepResult,
    TransferCommand,
    TransferEvent,
)

_POLL_S = 0.05
_START_SILENCE_LIMIT_S = 20.0  # beside importing and loading, which may hold a heartbeat up
_SILENCE_LIMIT_S = 6.0  # every rank's heartbeat comes once a second, also during a step

_decode = msgspec.msgpack.Decoder(RankEvent).decode
_encode = msgspec.msgpack.Encoder().encode


class Executor:
    """The ranks of one replica."""

    def __init__(self, config: EngineConfig) -> None:
        self.children: list[Child] = []
        self.connections: list[Connection] = []
        self._last_progress_s = time.monotonic()
        self._heard_s: list[float] = []
        self._n_layers_done = -1
        self._watches_start = config.model.device == "cpu"  # a driver may hold up a whole process for long
        self.n_rows_of_expert: dict[int, int] = {}  # as far as these ranks hold experts and count
        self.experts: dict[int, ExpertReport] = {}  # of each rank, as it told last
        self.transfer_events: list[tuple[int, TransferEvent]] = []  # of all ranks, since the core took them last
        self.endpoints: list[Endpoint] = []  # of all ranks, in order, where they can be read
        self.store: GroupStore | None = None  # opened by one of these ranks; all ranks of its group have to be told
        env = cpu_rank_environment(os.environ) if config.model.device == "cpu" else {}
        module = "fastdeploy.executor.worker" if config.model.synthetic is None else "fastdeploy.executor.synthetic"
        for rank in range(config.parallel.tensor):
            ours, theirs = socket.socketpair()
            number = config.parallel.data_rank * config.parallel.tensor + rank
            boot = RankBoot(config, number, theirs.fileno())
            output = Path(config.log_dir) / f"rank{number}.out"
            fds = [theirs.fileno()]
            child = Child(f"rank {number}", module, boot, output, pass_fds=fds, env=env)
            theirs.close()
            self.children.append(child)
            self.connections.append(Connection(ours.detach()))

    def wait_ready(
        self, on_progress: Callable[[LoadProgress], None], patience_s: float, meanwhile: Callable[[], None]
    ) -> RankReady:
        """Wait for all ranks; returns the one with the fewest pages. Raises the error a rank failed with.

        `meanwhile` is called several times a second; it may call `join_group`.
        """
        ready: dict[int, RankReady] = {}
        self._heard_s = [time.monotonic()] * len(self.connections)
        deadline_s = time.monotonic() + patience_s
        while len(ready) < len(self.connections):
            meanwhile()
            for connection in wait(self.connections, _POLL_S):
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                match self._receive(rank):
                    case RankReady() as message:
                        ready[rank] = message
                    case GroupStore() as store:
                        self.store = store
                    case LoadProgress() as progress:
                        deadline_s = time.monotonic() + patience_s
                        if rank == 0:
                            on_progress(progress)
                    case _:
                        pass
            if time.monotonic() > deadline_s:
                late = [child.name for rank, child in enumerate(self.children) if rank not in ready]
                raise errors.EngineStartError(f"{', '.join(late)}: no progress for {patience_s:.0f} s while starting")
            if self._watches_start:
                self.check_alive(_START_SILENCE_LIMIT_S)
        self._last_progress_s = time.monotonic()
        self._heard_s = [self._last_progress_s] * len(self.connections)
        found = [ready[rank].endpoint for rank in sorted(ready)]
        self.endpoints = [endpoint for endpoint in found if endpoint is not None]
        return min(ready.values(), key=lambda r: r.n_pages)

    def join_group(self, store: GroupStore) -> None:
        """Tell all ranks where their process group meets."""
        self._send(JoinGroup(store.host, store.port))

    def send(self, plan: StepPlan) -> None:
        """Give a plan to all ranks."""
        self._send(plan)

    def send_to(self, rank: int, command: TransferCommand) -> None:
        """Give a command about pages to one rank."""
        try:
            self.connections[rank].send_bytes(_encode(command))
        except OSError:
            raise self._dead(rank) from None

    def check_alive(self, limit_s: float = _SILENCE_LIMIT_S) -> None:
        """Raises EngineDeadError when a rank has been silent for too long, as a stopped process is."""
        now_s = time.monotonic()
        for rank, heard_s in enumerate(self._heard_s):
            if now_s - heard_s > limit_s:
                child = self.children[rank]
                raise errors.EngineDeadError(
                    f"{child.name} (pid {child.process.pid}) has been silent for {now_s - heard_s:.0f} s"
                )

    def _send(self, command: StepPlan | JoinGroup) -> None:
        data = _encode(command)
        for rank, connection in enumerate(self.connections):
            try:
                connection.send_bytes(data)
            except OSError:
                raise self._dead(rank) from None

    def receive(self) -> list[StepResult]:
        """Rank 0's results that have arrived; does not wait. Raises when a rank is gone or has failed."""
        results = []
        for rank, connection in enumerate(self.connections):
            while connection.poll(0):
                event = self._receive(rank)
                if isinstance(event, StepResult) and rank == 0:
                    results.append(event)
                    self._last_progress_s = time.monotonic()
                elif isinstance(event, PagesComputed | PullEnded):
                    self.transfer_events.append((rank, event))
        return results

    def stalled_s(self, busy_since_s: float) -> float:
        """Seconds without any progress of rank 0, given that it has had work since `busy_since_s` (monotonic)."""
        return max(0.0, time.monotonic() - max(self._last_progress_s, busy_since_s))

    def stop(self) -> None:
        """End all ranks."""
        for connection in self.connections:
            connection.close()
        for child in self.children:
            child.cut()
        for child in self.children:
            child.stop()

    def _receive(self, rank: int) -> RankEvent:
        try:
            event: RankEvent = _decode(self.connections[rank].recv_bytes())
        except (EOFError, OSError):
            raise self._dead(rank) from None
        if self._heard_s:
            self._heard_s[rank] = time.monotonic()
        if isinstance(event, RankAlive):
            self.n_rows_of_expert.update(event.n_rows_of_expert)
            if event.experts is not None:
                self.experts[rank] = event.experts
        match event:
            case RankFailed(kind, message):
                raise getattr(errors, kind, errors.EngineDeadError)(message)
            case RankAlive(n_layers_done) if rank == 0 and n_layers_done != self._n_layers_done:
                self._n_layers_done = n_layers_done
                self._last_progress_s = time.monotonic()
            case _:
                pass
        return event

    def _dead(self, rank: int) -> errors.EngineDeadError:
        child = self.children[rank]
        try:
            child.process.wait(2)
        except subprocess.TimeoutExpired:  # still going down: say so rather than wait for it
            return errors.EngineDeadError(f"{child.name} closed its connection")
        return errors.EngineDeadError(child.describe_death())
