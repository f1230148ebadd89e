"""The engine cores of a group in one process: real cores, hub and schedulers, in-memory wires, ranks without a model.

A wire keeps the order of what one end says to another and nothing else: when something arrives is up to the test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast
from unittest.mock import patch

from engine_sim import SimRank

from fastdeploy.config.schema import EngineConfig, ParallelConfig
from fastdeploy.engine.core import EngineCore
from fastdeploy.wire.experts import ExpertReport
from fastdeploy.wire.messages import (
    CoreBoot,
    Event,
    GroupAddress,
    GroupStore,
    LoadProgress,
    RankReady,
    StepAgreement,
    StepOutput,
    StepPlan,
    StepResult,
    TokenDelta,
    Withdrawn,
)

CLIENT = b"front end"


@dataclass
class Wires:
    """What was sent and has not arrived; `(sender, receiver)` names a wire. The hub is called "hub"."""

    held: dict[tuple[str, str], deque[Any]] = field(default_factory=dict)
    arrived: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)

    def send(self, sender: str, receiver: str, message: Any) -> None:
        self.held.setdefault((sender, receiver), deque()).append(message)

    def deliver(self, wire: tuple[str, str], n_messages: int) -> None:
        """The oldest so many messages of one wire arrive."""
        waiting = self.held[wire]
        for _ in range(min(n_messages, len(waiting))):
            self.arrived.setdefault(wire[1], []).append((wire[0], waiting.popleft()))

    def take(self, receiver: str) -> list[tuple[str, Any]]:
        return self.arrived.pop(receiver, [])


class MemberWire:
    """Stands for `MemberChannel`."""

    socket = None

    def __init__(self, wires: Wires, name: str) -> None:
        self._wires, self._name = wires, name

    def send(self, command: Any) -> None:
        self._wires.send(self._name, "hub", command)

    def receive_all(self) -> Iterator[Any]:
        yield from (message for _, message in self._wires.take(self._name))


class HubWire:
    """Stands for `HubChannel`."""

    socket = None

    def __init__(self, wires: Wires) -> None:
        self._wires = wires

    def receive_all(self) -> Iterator[tuple[bytes, Any]]:
        yield from ((sender.encode(), message) for sender, message in self._wires.take("hub"))

    def send(self, member: bytes, event: Any) -> bool:
        self._wires.send("hub", member.decode(), event)
        return True


class FrontEnd:
    """Stands for `CoreChannel` and for the front end behind it."""

    socket = None

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.deltas: list[TokenDelta] = []
        self.withdrawn: list[str] = []

    def receive_all(self) -> Iterator[tuple[bytes, Any]]:
        commands, self.commands = self.commands, []
        yield from ((CLIENT, command) for command in commands)

    def send(self, client: bytes, event: Event) -> bool:
        if isinstance(event, StepOutput):
            self.deltas += event.deltas
        elif isinstance(event, Withdrawn):
            self.withdrawn += event.request_ids
        return True


class Ranks:
    """Stands for `Executor`: a rank that has no model, and that answers a plan only when told to."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.cache.n_pages is not None
        self.store = GroupStore("127.0.0.1", 1) if config.parallel.data_rank == 0 else None
        self.joined = False
        self.agreements: list[StepAgreement] = []
        self.n_done = 0  # steps that may be answered
        self.n_rows_of_expert: dict[int, int] = {}
        self.experts: dict[int, ExpertReport] = {}
        self._ready = RankReady(config.cache.n_pages, 0, 0, {})
        self._rank = SimRank(config.cache.page_tokens)
        self._n_data, self._data_rank = config.parallel.data, config.parallel.data_rank
        self._results: deque[StepResult] = deque()

    def wait_ready(self, on_progress: Any, patience_s: float, meanwhile: Any) -> RankReady:
        on_progress(LoadProgress("weights", 1, 1, "tensors"))
        return self._ready

    def join_group(self, store: GroupStore) -> None:
        self.joined = True

    def send(self, plan: StepPlan) -> None:
        """The agreement must be about this very plan."""
        agreed = plan.agreement
        assert agreed is not None and self.joined
        assert len(agreed.n_tokens_d) == self._n_data
        assert agreed.n_tokens_d[self._data_rank] == sum(plan.n_tokens)
        self.agreements.append(agreed)
        self._results.append(self._rank.step(plan))

    def receive(self) -> list[StepResult]:
        found = []
        while self._results and self.n_done:
            self.n_done -= 1
            found.append(self._results.popleft())
        return found

    def check_alive(self) -> None: ...

    def stalled_s(self, busy_since_s: float) -> float:
        return 0.0


class Group:
    """`n` cores that have met."""

    def __init__(self, config: EngineConfig, n: int) -> None:
        self.wires = Wires()
        self.cores: list[EngineCore] = []
        self.front_ends: list[FrontEnd] = []
        self.ranks: list[Ranks] = []
        for data_rank in range(n):
            self._make(config, n, data_rank)
        for _ in range(8):
            self.deliver_all()
            for core in self.cores:
                core._bring_ranks_together()
        for core in self.cores:
            core.start()

    def _make(self, config: EngineConfig, n: int, data_rank: int) -> None:
        name = f"core{data_rank}"
        parallel = ParallelConfig(data=n, expert=True, data_rank=data_rank, serves=(data_rank,))
        front_end, ranks = FrontEnd(), Ranks(replace(config, parallel=parallel))
        boot = CoreBoot(replace(config, parallel=parallel), GroupAddress("", b"", b"", 60.0), "", b"", b"")
        with (
            patch("fastdeploy.engine.core.CoreChannel", lambda *_: front_end),
            patch("fastdeploy.engine.core.Executor", lambda _: ranks),
            patch("fastdeploy.engine.group.HubChannel", lambda *_: HubWire(self.wires)),
            patch("fastdeploy.engine.group.MemberChannel", lambda *_: MemberWire(self.wires, name)),
        ):
            self.cores.append(EngineCore(boot))
        self.front_ends.append(front_end)
        self.ranks.append(ranks)

    @property
    def idle(self) -> bool:
        """Whether no core has a request or a step in flight, and nothing is on its way."""
        return (
            all(core.scheduler.idle and not core.in_flight and core.proposed is None for core in self.cores)
            and not any(front_end.commands for front_end in self.front_ends)
            and not any(self.wires.held.values())
            and not any(self.wires.arrived.values())
        )

    def deliver_all(self) -> None:
        """Everything arrives."""
        for wire in list(self.wires.held):
            self.wires.deliver(wire, 1_000_000)

    def turn(self, data_rank: int) -> None:
        """One pass of a core's loop."""
        self.cores[data_rank].turn()
        cast(Any, self.cores[data_rank].scheduler).pool.check()

    def run(self, max_rounds: int) -> int:
        """All that was sent arrives and all ranks compute, round after round, until nothing is left to do."""
        for i in range(max_rounds):
            if self.idle:
                return i
            for data_rank, ranks in enumerate(self.ranks):
                self.deliver_all()
                ranks.n_done = 1
                self.turn(data_rank)
        raise AssertionError(f"the group is not idle after {max_rounds} rounds")
