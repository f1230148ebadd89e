"""A planned step from which prompts are cut before the ranks see it, as a group does to keep its ranks even."""

from __future__ import annotations

import pytest
from engine_sim import Engine, expected_output, make_config, make_submit
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.engine.step import PlannedStep, is_decode, trimmed

pytestmark = pytest.mark.timeout(120)


def ids(n: int) -> list[int]:
    """Of the small vocabulary that simulated ranks have."""
    return [i % 16 for i in range(n)]


class CuttingEngine(Engine):
    """Cuts every step to its decodes and some of its prompt tokens; `cuts` says how many, round and round."""

    def __init__(self, cuts: list[int], **config: int) -> None:
        super().__init__(make_config(max_partial_prefills=8, **config))
        self.cuts = cuts

    def plan(self) -> PlannedStep | None:
        planned = self.scheduler.plan(self.now_s)
        if planned is None:
            return None
        n_decodes = sum(map(is_decode, planned.plan.n_tokens, planned.plan.samples))
        planned = trimmed(planned, n_decodes + self.cuts[len(self.plans) % len(self.cuts)])
        self.seen.update((request.id, request) for request in planned.requests)
        self.check()
        self.plans.append(planned)
        self.in_flight.append((planned, self.rank.step(planned.plan)))
        return planned


def test_prompts_that_came_last_lose_their_tokens_first() -> None:
    engine = CuttingEngine([25, 99], max_seqs=4, max_batched_tokens=64)
    for name, n in (("a", 20), ("b", 15), ("c", 9)):
        engine.submit(make_submit(name, ids(n)))
    engine.turn()
    (first,) = engine.plans
    assert (first.plan.n_tokens, first.plan.samples) == ([20, 5], [True, False])
    assert [request.id for request in first.requests] == ["a", "b"] and len(first.plan.starts) == 3
    engine.turn()
    assert {r.id: n for r, n in zip(engine.plans[1].requests, engine.plans[1].plan.n_tokens, strict=True)} == {
        "a": 1,
        "b": 10,
        "c": 9,
    }


def test_what_fits_is_left_alone() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", ids(6)))
    planned = engine.scheduler.plan(0.0)
    assert planned is not None and trimmed(planned, 6) is planned


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=10),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(6, 40),
)
def test_answers_do_not_depend_on_cuts(requests: list[tuple[int, int]], cuts: list[int], n_pages: int) -> None:
    engine = CuttingEngine(cuts, max_seqs=4, max_batched_tokens=32, n_pages=n_pages + 8, page_tokens=4)
    submits = [make_submit(str(i), [i, *ids(n)], max_tokens=m) for i, (n, m) in enumerate(requests)]
    engine.submit(*submits)
    engine.run()
    for submit in submits:
        answer = engine.answers[submit.request_id]
        assert (answer.token_ids, answer.reason) == expected_output(submit, engine.config)


def test_an_aborted_request_is_cut_as_well() -> None:
    engine = CuttingEngine([4], max_seqs=4, max_batched_tokens=64)
    engine.submit(make_submit("a", ids(20)), make_submit("b", ids(10)))
    planned = engine.scheduler.plan(0.0)
    assert planned is not None
    engine.receive(engine.scheduler.abort(["b"]))
    cut = trimmed(planned, 22)
    assert cut.plan.n_tokens == [20, 2]
    engine.scheduler.pool.check()
