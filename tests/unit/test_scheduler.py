"""Scheduler.plan, rule by rule, on small traces: admission, chunked prefill, preemption."""

import pytest
from engine_sim import Engine, expected_output, granted, make_config, make_submit, make_submits

from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(120)


# ---- admission ---------------------------------------------------------------------------------------------------


def test_all_that_fit_start_together() -> None:
    engine = Engine(make_config(max_seqs=4, max_batched_tokens=64))
    engine.submit(*make_submits(6))
    engine.plan()
    assert granted(engine) == [{"0": 8, "1": 8, "2": 8, "3": 8}]
    assert (engine.scheduler.status().n_running, engine.scheduler.n_waiting) == (4, 2)
    assert engine.plans[0].plan.samples == [True] * 4


def test_start_names_tokens_pages_and_slot() -> None:
    engine = Engine(make_config(page_tokens=4))
    (submit,) = make_submits(1, n_prompt=9)
    engine.submit(submit)
    engine.plan()
    (start,) = engine.plans[0].plan.starts
    assert start.token_ids == submit.prompt_ids
    assert (start.slot, start.n_prompt_tokens, start.n_computed) == (engine.plans[0].plan.slots[0], 9, 0)
    assert len(set(start.page_ids)) == 3
    assert start.params == submit.params


def test_first_that_does_not_fit_blocks_the_rest() -> None:
    engine = Engine(make_config(n_pages=8, page_tokens=4))
    engine.submit(make_submit("a", range(12)), make_submit("big", range(14)), make_submit("small", [1, 2]))
    engine.plan()
    assert granted(engine) == [{"a": 12}]
    engine.run()
    assert [engine.answers[i].reason for i in ("a", "big", "small")] == ["length"] * 3


def test_admission_leaves_each_running_request_a_page() -> None:
    engine = Engine(make_config(n_pages=8, page_tokens=4))
    engine.submit(*make_submits(3, n_prompt=8))
    engine.plan()
    assert granted(engine) == [{"0": 8, "1": 8}]  # 4 pages left: 2 for a third prompt, but 3 are reserved
    assert engine.scheduler.status().n_preempted_total == 0


def test_lone_request_may_take_all_pages() -> None:
    engine = Engine(make_config(n_pages=4, page_tokens=4, max_model_len=64))
    engine.submit(make_submit("a", range(15), max_tokens=1))
    engine.run()
    assert engine.answers["a"].reason == "length"


def test_request_that_outgrows_all_pages_ends() -> None:
    engine = Engine(make_config(n_pages=4, page_tokens=4), depth=2)
    submit = make_submit("a", range(10), max_tokens=40)
    engine.submit(submit)
    engine.run()
    assert engine.answers["a"].reason == "length"
    assert len(engine.answers["a"].token_ids) == 7  # 16 positions, and one token that is never fed back
    assert engine.answers["a"].token_ids == expected_output(submit, engine.config)[0]


# ---- chunked prefill ---------------------------------------------------------------------------------------------


def test_prompt_is_cut_to_the_budget() -> None:
    engine = Engine(make_config(max_batched_tokens=10, max_seqs=4))
    engine.submit(make_submit("a", range(14), max_tokens=2), make_submit("b", [1] * 9, max_tokens=2))
    for _ in range(4):
        engine.turn()
    assert granted(engine) == [{"a": 10}, {"a": 4, "b": 6}, {"a": 1, "b": 3}, {"b": 1}]
    assert [planned.plan.samples for planned in engine.plans] == [[False], [True, False], [True, True], [True]]


def test_decodes_come_before_prompts() -> None:
    engine = Engine(make_config(max_batched_tokens=8, max_seqs=4, max_model_len=64))
    engine.submit(make_submit("a", [1, 2], max_tokens=9))
    engine.turn()
    engine.submit(make_submit("b", range(16)))
    for _ in range(3):
        engine.turn()
    assert granted(engine)[1:] == [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1, "b": 2}]


def test_one_prompt_is_midway_at_a_time() -> None:
    engine = Engine(make_config(max_batched_tokens=8, max_seqs=4))
    engine.submit(*make_submits(3, n_prompt=12, max_tokens=1))
    engine.run()
    assert granted(engine) == [{"0": 8}, {"0": 4, "1": 4}, {"1": 8}, {"2": 8}, {"2": 4}]


def test_partial_prefills_share_the_budget() -> None:
    engine = Engine(make_config(max_batched_tokens=8, max_seqs=4, max_partial_prefills=2, max_long_partial_prefills=2))
    engine.submit(*make_submits(3, n_prompt=12, max_tokens=1))
    engine.run()
    assert granted(engine) == [{"0": 4, "1": 4}, {"0": 4, "1": 4}, {"0": 4, "1": 2, "2": 2}, {"1": 2, "2": 6}, {"2": 4}]


def test_earlier_prompt_gets_no_smaller_share() -> None:
    engine = Engine(make_config(max_batched_tokens=4, max_seqs=3, max_partial_prefills=3, max_long_partial_prefills=3))
    engine.submit(*make_submits(3, n_prompt=2, max_tokens=1))
    engine.plan()
    assert granted(engine) == [{"0": 2, "1": 1, "2": 1}]


def test_unused_share_goes_to_the_prompt_that_is_midway() -> None:
    engine = Engine(make_config(max_batched_tokens=8, max_seqs=4, max_partial_prefills=4, max_long_partial_prefills=4))
    engine.submit(make_submit("a", range(16), max_tokens=1))
    engine.plan()
    assert granted(engine) == [{"a": 8}]


def test_short_prompts_overtake_when_long_ones_are_limited() -> None:
    engine = Engine(
        make_config(
            max_batched_tokens=8,
            max_seqs=8,
            max_partial_prefills=2,
            max_long_partial_prefills=1,
            long_prefill_tokens=9,
            prefix_caching=False,
        )
    )
    engine.submit(make_submit("long", [1] * 20), make_submit("longer", [2] * 24), make_submit("short", [3] * 3))
    engine.plan()
    assert granted(engine) == [{"long": 5, "short": 3}]
    engine.run()
    assert engine.answers["short"].first_step < engine.answers["long"].first_step
    assert engine.answers["long"].first_step < engine.answers["longer"].first_step


def test_without_chunks_a_prompt_is_granted_whole() -> None:
    engine = Engine(make_config(chunked_prefill=False, max_batched_tokens=20, max_model_len=20, max_seqs=4))
    engine.submit(*make_submits(3, n_prompt=9, max_tokens=1))
    engine.run()
    assert granted(engine) == [{"0": 9, "1": 9}, {"2": 9}]


def test_limits_that_would_stall_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-model-len"):
        Scheduler(make_config(chunked_prefill=False, max_batched_tokens=20, max_model_len=21))
    with pytest.raises(ConfigError, match="--max-num-seqs"):
        Scheduler(make_config(max_batched_tokens=4, max_seqs=5))


# ---- preemption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_last_to_come_gives_its_pages_back_and_resumes_in_order(depth: int) -> None:
    engine = Engine(make_config(n_pages=10, page_tokens=2, max_seqs=3), depth=depth)
    submits = make_submits(3, n_prompt=3, max_tokens=12)
    engine.submit(*submits)
    engine.run()
    status = engine.scheduler.status()
    assert status.n_preempted_total > 0
    assert status.n_generated_tokens_total == 36
    for submit in submits:
        assert engine.answers[submit.request_id].token_ids == expected_output(submit, engine.config)[0]
    resumed = [start for planned in engine.plans for start in planned.plan.starts if len(start.token_ids) > 3]
    assert resumed
    assert all(start.n_prompt_tokens == 3 for start in resumed)
    ends = [engine.answers[str(i)].deltas[-1].times for i in range(3)]
    assert ends[0].last_token_s < ends[1].last_token_s < ends[2].last_token_s  # type: ignore[union-attr]


def test_preempted_request_finds_its_own_pages() -> None:
    engine = Engine(make_config(n_pages=6, page_tokens=2, max_seqs=2))
    engine.submit(make_submit("a", [1, 2, 3], max_tokens=6), make_submit("b", [4, 5], max_tokens=7))
    engine.run()
    assert engine.scheduler.status().n_preempted_total == 1
    (resumed,) = [s for p in engine.plans[1:] for s in p.plan.starts]
    assert 0 < resumed.n_computed < len(resumed.token_ids)
    assert engine.answers["b"].deltas[-1].n_cached_tokens == 0  # what the first start found


def test_output_of_a_preempted_request_is_not_kept_unless_wanted() -> None:
    engine = Engine(make_config(n_pages=6, page_tokens=2, max_seqs=2, output_caching=False))
    engine.submit(make_submit("a", [1, 2, 3], max_tokens=10), make_submit("b", [4, 5], max_tokens=7))
    engine.run()
    assert engine.scheduler.status().n_preempted_total == 1
    # b lost all its pages, so its prompt and output so far were computed again by one grant.
    assert [(s.n_computed, len(s.token_ids) > 4) for p in engine.plans[1:] for s in p.plan.starts] == [(0, True)]
    assert engine.scheduler.pool.n_cached == 2  # one full page of each prompt


def test_results_from_before_a_preemption_say_nothing_about_the_new_pages() -> None:
    engine = Engine(make_config(n_pages=8, page_tokens=2, max_seqs=2, max_batched_tokens=2), depth=20)
    submits = make_submit("a", [1, 2, 3], max_tokens=20), make_submit("b", range(2, 10), prompt_logprobs=1)
    engine.submit(*submits)
    while not engine.scheduler.status().n_preempted_total:
        engine.plan()
    assert granted(engine)[-2] == {"a": 1, "b": 1}  # b was midway, and none of it is committed
    engine.receive(engine.scheduler.abort(["a"]))
    engine.plan()
    assert granted(engine)[-1] == {"b": 2}
    b = engine.seen["b"]
    for _ in range(len(engine.plans) - 1):
        engine.commit()
        assert (b.n_computed, b.prompt_logprobs) == (0, [None])
    engine.run()
    assert engine.answers["b"].token_ids == expected_output(submits[1], engine.config)[0]
    prompt_logprobs = engine.answers["b"].deltas[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert [entry.token_id for entry in prompt_logprobs if entry] == list(range(3, 10))


def test_preemption_goes_by_arrival_not_by_start() -> None:
    limits = {"max_partial_prefills": 2, "max_long_partial_prefills": 1, "long_prefill_tokens": 9}
    config = make_config(n_pages=17, max_batched_tokens=8, prefix_caching=False, **limits)
    engine = Engine(config)
    engine.submit(make_submit("long", [1] * 20, 9), make_submit("longer", [2] * 16, 30), make_submit("short", [3], 30))
    while not engine.scheduler.status().n_preempted_total:
        engine.turn()
    starts = [request.id for p in engine.plans for request in p.requests if request.start_step == p.plan.step]
    assert starts == ["long", "short", "longer"]
    assert [request.id for request in engine.seen.values() if request.alive and request.slot < 0] == ["short"]


def test_preempted_request_waits_for_its_samples_in_flight() -> None:
    engine = Engine(make_config(n_pages=6, page_tokens=2, max_seqs=2), depth=3)
    engine.submit(make_submit("a", [1, 2, 3], max_tokens=6), make_submit("b", [4, 5], max_tokens=7))
    while not engine.scheduler.status().n_preempted_total:
        engine.turn()
    b = next(request for planned in engine.plans for request in planned.requests if request.id == "b")
    assert (b.slot, b.pages) == (-1, [])
    assert b.n_in_flight > 0
    engine.scheduler.abort(["a"])  # every page is free now, and b still may not start
    assert engine.scheduler.plan(0.0) is None
    while engine.in_flight:
        engine.commit()
    planned = engine.plan()
    assert planned is not None
    assert planned.plan.starts[0].token_ids == b.token_ids[: len(planned.plan.starts[0].token_ids)]
    assert len(planned.plan.starts[0].token_ids) > 2
