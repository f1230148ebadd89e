"""Cores of a group under random arrivals, aborts, delays and uneven work: they agree, nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from engine_sim import expected_output, make_config, make_submit
from group_sim import Group
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fastdeploy.config.schema import EngineConfig, EplbConfig
from fastdeploy.errors import EngineDeadError
from fastdeploy.wire.group import Leave
from fastdeploy.wire.messages import Abort, Rearrange, Shutdown, Submit, Withdraw

pytestmark = pytest.mark.timeout(280)

MAX_LEN = 32
common = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@dataclass(frozen=True)
class Happening:
    """Something that happens between two passes of the loops of all cores."""

    what: str
    data_rank: int = 0
    command: Any = None
    wire: int = 0
    n: int = 1


@dataclass(frozen=True)
class Trace:
    """A group and all that happens to it; afterwards everything arrives until nothing is left to do."""

    config: EngineConfig
    n_data: int
    happenings: list[Happening]


@st.composite
def traces(draw: st.DrawFn, *, rearranges: bool = False) -> Trace:
    """With `rearranges` clients also ask for experts to be moved."""
    n_data = draw(st.integers(2, 5))
    page_tokens = draw(st.integers(1, 5))
    max_seqs = draw(st.integers(1, 4))
    config = make_config(
        page_tokens=page_tokens,
        n_pages=draw(st.integers(MAX_LEN + 2, 90)) // page_tokens,
        max_model_len=MAX_LEN,
        max_seqs=max_seqs,
        max_batched_tokens=draw(st.integers(max_seqs, MAX_LEN)),
        chunked_prefill=True,
        prefix_caching=draw(st.booleans()),
        steps_in_flight=draw(st.integers(1, 3)),
    )
    ranks = st.integers(0, n_data - 1)
    busy = draw(st.sampled_from([ranks, st.just(n_data - 1), st.just(0)]))  # uneven: all work on one of them
    n_requests = 0
    happenings = []
    for _ in range(draw(st.integers(1, 60))):
        choices = ["turn", "turn", "turn", "arrive", "arrive", "compute", "compute", "submit", "end"]
        what = draw(st.sampled_from(choices + ["rearrange"] * rearranges))
        happening = Happening(what, draw(ranks), wire=draw(st.integers(0, 20)), n=draw(st.integers(1, 3)))
        if what == "submit":
            prompt = draw(st.lists(st.integers(2, 15), min_size=1, max_size=20))
            submit = make_submit(str(n_requests), prompt, draw(st.integers(1, 10)))
            happening = Happening("command", draw(busy), submit)
            n_requests += 1
        elif what == "rearrange":
            happening = Happening("command", draw(ranks), Rearrange())
        elif what == "end" and n_requests:
            command = draw(st.sampled_from([Abort([str(draw(st.integers(0, n_requests - 1)))]), Withdraw(1)]))
            happening = Happening("command", draw(ranks), command)
        happenings.append(happening)
    return Trace(config, n_data, happenings)


def play(trace: Trace) -> tuple[Group, dict[str, tuple[int, Submit]]]:
    """Run a trace to its end; returns where each request went."""
    group = Group(trace.config, trace.n_data)
    sent: dict[str, tuple[int, Submit]] = {}
    for happening in trace.happenings:
        rank = happening.data_rank
        if happening.what == "turn":
            group.turn(rank)
        elif happening.what == "compute":
            group.ranks[rank].n_done = happening.n
            group.turn(rank)
        elif happening.what == "arrive" and group.wires.held:
            wires = sorted(group.wires.held)
            group.wires.deliver(wires[happening.wire % len(wires)], happening.n)
        elif happening.what == "command":
            group.front_ends[rank].commands.append(happening.command)
            if isinstance(happening.command, Submit):
                sent[happening.command.request_id] = rank, happening.command
    n_positions = sum(len(submit.prompt_ids) + (submit.params.max_tokens or 0) for _, submit in sent.values())
    event(f"{group.run(50 + 8 * n_positions) // 20 * 20}+ rounds at the end")
    return group, sent


def check_agreements(group: Group) -> None:
    """All ranks saw the same sequence of steps, and none was made for nothing."""
    first, *others = [ranks.agreements for ranks in group.ranks]
    assert all(agreements == first for agreements in others)
    for agreed in first:
        assert agreed.n_rows == max(agreed.n_tokens_d) > 0 and not agreed.use_graph


@common
@given(traces())
def test_all_agree_and_every_request_ends(trace: Trace) -> None:
    group, sent = play(trace)
    check_agreements(group)
    for request_id, (rank, submit) in sent.items():
        front_end = group.front_ends[rank]
        deltas = [delta for delta in front_end.deltas if delta.request_id == request_id]
        if request_id in front_end.withdrawn:
            assert not deltas
            continue
        token_ids, reason = expected_output(submit, trace.config)
        found = [token_id for delta in deltas for token_id in delta.token_ids]
        assert [bool(delta.finish_reason) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        if deltas[-1].finish_reason == "abort":
            assert found == token_ids[: len(found)]
        else:
            assert (found, deltas[-1].finish_reason) == (token_ids, reason)
    assert all(core.scheduler.pool.n_held == 0 for core in group.cores)


@common
@given(traces(rearranges=True))
def test_experts_are_moved_by_all_in_the_same_step(trace: Trace) -> None:
    """Whoever was asked, busy or idle; a step for nothing else is made only then, and requests do not notice."""
    group, sent = play(replace(trace, config=replace(trace.config, eplb=EplbConfig(interval_s=0.0))))
    first, *others = [ranks.agreements for ranks in group.ranks]
    assert all(agreements == first for agreements in others)
    assert all(agreed.rearrange or max(agreed.n_tokens_d) > 0 for agreed in first)
    n_asked = sum(isinstance(happening.command, Rearrange) for happening in trace.happenings)
    assert min(n_asked, 1) <= sum(agreed.rearrange for agreed in first) <= n_asked
    assert not any(core.rearranging.asked for core in group.cores)
    for request_id, (rank, _) in sent.items():
        front_end = group.front_ends[rank]
        ends = [d for d in front_end.deltas if d.request_id == request_id and d.finish_reason]
        assert request_id in front_end.withdrawn or len(ends) == 1


@common
@given(traces())
def test_an_idle_group_makes_no_steps(trace: Trace) -> None:
    group, _ = play(trace)
    n_steps = len(group.ranks[0].agreements)
    for _ in range(5):
        for rank in range(trace.n_data):
            group.turn(rank)
            group.deliver_all()
    assert len(group.ranks[0].agreements) == n_steps


@common
@given(traces(), st.data())
def test_all_leave_together_whatever_is_going_on(trace: Trace, data: st.DataObject) -> None:
    """A core that was told to stop serves the others until all were."""
    order = data.draw(st.permutations(range(trace.n_data)))
    group, _ = play(trace)
    last = order[-1]
    for rank in order[:-1]:
        group.front_ends[rank].commands.append(Shutdown())
    group.front_ends[last].commands.append(make_submit("last", [3, 4, 5]))
    group.run(200)
    assert [d.finish_reason for d in group.front_ends[last].deltas if d.request_id == "last"][-1] == "length"
    assert not any(core._stopped() for core in group.cores)
    group.front_ends[last].commands.append(Shutdown())
    group.run(200)
    assert all(core._stopped() for core in group.cores)
    check_agreements(group)


def test_a_failure_reaches_all() -> None:
    group = Group(make_config(), 3)
    group.front_ends[1].commands.append(make_submit("0", [3, 4, 5], 50))
    for _ in range(5):
        for rank in range(3):
            group.deliver_all()
            group.turn(rank)
    group.wires.send("core2", "hub", Leave("rank 2 was killed"))
    group.deliver_all()
    group.turn(0)  # with the hub
    group.deliver_all()
    for rank in range(3):
        with pytest.raises(EngineDeadError, match="data-parallel rank 2: rank 2 was killed"):
            group.turn(rank)
