"""Scheduler on random traces, against one request at a time.

`Engine` and `SimRank` check on the way, at every step: the budget, the slots, the limits on unfinished prompts, that
pages are conserved, that no page has two writers, and that every context read is the request's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from engine_sim import Engine, expected_output, make_config, make_submit
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import InvalidRequest
from fastdeploy.wire.messages import Submit

pytestmark = pytest.mark.timeout(280)

MAX_MODEL_LEN = 32
common = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@dataclass(frozen=True)
class Trace:
    """What happens to an engine: at turn `i`, `arrivals[i]` are submitted and `aborts[i]` aborted."""

    config: EngineConfig
    depth: int
    arrivals: list[list[Submit]]
    aborts: dict[int, list[str]]
    commits_first: list[bool]  # turns at which a commit goes before the plan although the depth allows another plan


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> EngineConfig:
    max_seqs = draw(st.integers(1, 5))
    chunked = draw(st.booleans())
    n_partial = draw(st.integers(1, 3))
    page_tokens = draw(st.integers(1, 5))
    fields: dict[str, Any] = {
        "page_tokens": page_tokens,
        "n_pages": draw(st.integers(15, 70)) // page_tokens,
        "max_model_len": MAX_MODEL_LEN,
        "prefix_caching": draw(st.sampled_from([True, True, False])),
        "output_caching": draw(st.booleans()),
        "max_seqs": max_seqs,
        "max_batched_tokens": draw(st.integers(max_seqs if chunked else MAX_MODEL_LEN, MAX_MODEL_LEN + 10)),
        "chunked_prefill": chunked,
        "max_partial_prefills": n_partial,
        "max_long_partial_prefills": draw(st.integers(1, n_partial)),
        "long_prefill_tokens": draw(st.integers(0, 12)),
    }
    return make_config(**{**fields, **fixed})


@st.composite
def submits(draw: st.DrawFn, request_id: str) -> Submit:
    # Two families of prompts, so that beginnings are often shared.
    family, n_shared = draw(st.sampled_from([0, 0, 1])), draw(st.sampled_from([0, 5, 8, 9, 12, 16]))
    own = draw(st.lists(st.integers(2, 15), min_size=0 if n_shared else 1, max_size=6))
    max_tokens = draw(st.integers(1, 20))
    return make_submit(
        request_id,
        [*((i * i + family) % 14 + 2 for i in range(n_shared)), *own],
        max_tokens,
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([None, None, [3], [4, 9]])),
        min_tokens=draw(st.integers(0, min(4, max_tokens))),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    arrivals: list[list[Submit]] = [[] for _ in range(12)]
    n_requests = draw(st.sampled_from([1, 3, 5, 8, 12]))
    for i in range(n_requests):
        arrivals[draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 11]))].append(draw(submits(str(i))))
    aborts: dict[int, list[str]] = {}
    for turn, i in draw(st.lists(st.tuples(st.integers(0, 25), st.integers(0, n_requests - 1)), max_size=3)):
        aborts.setdefault(turn, []).append(str(i))
    return Trace(
        config=draw(configs()),
        depth=draw(st.integers(1, 3)),
        arrivals=arrivals,
        aborts=aborts,
        commits_first=draw(st.lists(st.booleans(), min_size=12, max_size=12)),
    )


def play(trace: Trace) -> tuple[Engine, list[Submit]]:
    """Run a trace to its end; returns the requests that were not refused."""
    engine, accepted = Engine(trace.config, trace.depth), []
    for turn in range(26):
        for submit in trace.arrivals[turn] if turn < len(trace.arrivals) else ():
            try:
                engine.submit(submit)
                accepted.append(submit)
            except InvalidRequest:
                n_room = engine.scheduler.pool.n_pages * trace.config.cache.page_tokens
                assert len(submit.prompt_ids) + 1 > n_room
        if engine.in_flight and trace.commits_first[turn % len(trace.commits_first)]:
            engine.commit()
        engine.receive(engine.scheduler.abort(trace.aborts.get(turn, [])))
        engine.check()
        if engine.in_flight or not engine.scheduler.idle:
            engine.turn()
    # Each turn computes at least one position for the oldest request; every preemption makes room for an older one.
    n_positions = sum(len(submit.prompt_ids) + (submit.params.max_tokens or 0) for submit in accepted)
    engine.run(max_turns=50 + 4 * trace.depth * n_positions)
    return engine, accepted


def check_answer(engine: Engine, submit: Submit) -> None:
    answer = engine.answers[submit.request_id]
    token_ids, reason = expected_output(submit, engine.config)
    if answer.reason == "abort":
        assert answer.token_ids == token_ids[: len(answer.token_ids)]
    else:
        assert (answer.token_ids, answer.reason) == (token_ids, reason)
        assert answer.deltas[-1].stop_token_id == (token_ids[-1] if reason == "stop" else None)
    if answer.token_ids and submit.params.prompt_logprobs is not None:
        seen = answer.deltas[0].prompt_logprobs
        assert seen is not None
        assert [entry and entry.token_id for entry in seen] == [None, *submit.prompt_ids[1:]]


@settings(common, max_examples=400)
@given(traces())
def test_every_answer_is_that_of_a_request_alone(trace: Trace) -> None:
    engine, accepted = play(trace)
    for submit in accepted:
        check_answer(engine, submit)
    status = engine.scheduler.status()
    event("preempted" if status.n_preempted_total else "not preempted")
    event("prefix hit" if status.n_cached_tokens_total else "no prefix hit")
    assert engine.scheduler.pool.n_held == 0
    assert status.n_generated_tokens_total == sum(len(answer.token_ids) for answer in engine.answers.values())
    for planned in engine.plans:
        assert all(not request.alive and request.slot < 0 for request in planned.requests)


@common
@given(configs(chunked_prefill=True), st.integers(1, 3), st.integers(1, 14), st.integers(1, 8), st.integers(2, 8))
def test_equal_requests_get_their_first_token_in_order(
    config: EngineConfig, depth: int, n_prompt: int, max_tokens: int, n_requests: int
) -> None:
    engine = Engine(config, depth)
    if n_prompt + 1 > engine.scheduler.pool.n_pages * config.cache.page_tokens:
        return
    for i in range(n_requests):
        engine.submit(make_submit(str(i), [2 + i, *range(2, n_prompt + 1)], max_tokens))
    engine.run()
    firsts = [engine.answers[str(i)].first_step for i in range(n_requests)]
    if not engine.scheduler.status().n_preempted_total:
        assert firsts == sorted(firsts)
    starts = [r.id for p in engine.plans for r in p.requests if p.plan.step == r.start_step and r.n_starts == 1]
    assert starts == sorted(starts)


@common
@given(traces())
def test_nothing_is_left_when_clients_go(trace: Trace) -> None:
    engine = Engine(trace.config, trace.depth)
    clients = (b"x", b"y")
    names: dict[bytes, list[str]] = {client: [] for client in clients}
    for i, submit in enumerate(submit for batch in trace.arrivals for submit in batch):
        if len(submit.prompt_ids) + 1 <= engine.scheduler.pool.n_pages * trace.config.cache.page_tokens:
            engine.submit(submit, client=clients[i % 2])
            names[clients[i % 2]].append(submit.request_id)
    for _ in range(4):
        if engine.in_flight or not engine.scheduler.idle:
            engine.turn()
    engine.scheduler.drop_client(b"x")
    engine.check()
    engine.run()
    assert all(engine.answers[name].reason is not None for name in names[b"y"])
    assert engine.scheduler.pool.n_held == 0
