"""What tests let rank processes do: meet, build a runner, take steps. Every function gets the process's state first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rank_processes import RankProcesses, State

from fastdeploy.config.schema import EngineConfig, ParallelConfig
from fastdeploy.wire.messages import StepPlan, StepResult

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from fastdeploy.distributed.groups import Group

Meeting = tuple[str, int]


def open_store(state: State, parallel: ParallelConfig, number: int) -> Meeting | None:
    """If this rank is the first of its group: where its group meets."""
    from fastdeploy.distributed import groups, topology

    state.clear()
    where = topology.position(parallel, number)
    if where.group_size == 1 or where.group_rank != 0:
        return None
    state["store"], host, port = groups.open_store(parallel, number)
    return host, port


def join(state: State, parallel: ParallelConfig, number: int, meeting: Meeting | None) -> None:
    """Meet the others; the group is kept."""
    state["group"] = _join(state, parallel, number, meeting)


def build(
    state: State, config: EngineConfig, number: int, meeting: Meeting | None, exchange: str | None
) -> tuple[int, int]:
    """Build the runner of one rank, which is kept; returns (bytes of its weights, its number of pages)."""
    from fastdeploy.runner.build import build_runner

    met = _Met(state, config.parallel, number, meeting) if meeting else None
    runner, _ = build_runner(config, number=number, meeting=met, exchange=exchange)
    if runner.balancer is None:
        runner.model.count_expert_loads()
    state["runner"] = runner
    return runner.weight_bytes, runner.n_pages


def step(state: State, plan: StepPlan) -> StepResult:
    """Take one step."""
    result: StepResult = state["runner"].launch(plan)()
    return result


def expert_loads(state: State) -> list[list[int]]:
    """Rows that went to each local expert of each sparse layer."""
    loads: list[list[int]] = state["runner"].model.expert_loads().tolist()
    return loads


def meet(ranks: RankProcesses, parallel: ParallelConfig) -> list[Meeting | None]:
    """Open the stores of all groups; returns where each rank meets its group."""
    from fastdeploy.distributed import topology

    numbers = range(parallel.n_ranks)
    meetings = ranks.call(open_store, [(parallel, number) for number in numbers])
    return [meetings[topology.numbers_of_group(parallel, number)[0]] for number in numbers]


def make_group(ranks: RankProcesses, parallel: ParallelConfig) -> None:
    """Every process has a group in its state afterwards."""
    meetings = meet(ranks, parallel)
    ranks.call(join, [(parallel, number, meeting) for number, meeting in enumerate(meetings)])


class _Met:
    """Implements groups.Meeting."""

    def __init__(self, state: State, parallel: ParallelConfig, number: int, meeting: Meeting) -> None:
        self._state, self._parallel, self._number, self._meeting = state, parallel, number, meeting

    def store(self) -> Store:
        from fastdeploy.distributed import groups

        if "store" not in self._state:
            self._state["store"] = groups.reach_store(self._number, *self._meeting, 60)
        store: Store = self._state["store"]
        return store

    def join(self) -> Group:
        return _join(self._state, self._parallel, self._number, self._meeting)


def _join(state: State, parallel: ParallelConfig, number: int, meeting: Meeting | None) -> Group:
    import torch

    from fastdeploy.distributed import groups

    assert meeting is not None, "a rank by itself does not join"
    host, port = meeting
    return groups.join(parallel, number, torch.device("cpu"), host, port, state.get("store"), patience_s=60)
