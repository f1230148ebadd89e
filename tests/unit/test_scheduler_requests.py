"""Scheduler, rule by rule, on small traces: how requests come and end, and what their answers carry."""

import pytest
from engine_sim import CLIENT, EOS, Engine, expected_output, granted, make_config, make_submit, make_submits

from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.errors import ContextTooLong, EngineError, InvalidRequest, Overloaded
from fastdeploy.wire.messages import StepResult, Submit

pytestmark = pytest.mark.timeout(120)


# ---- the end of a request ----------------------------------------------------------------------------------------


def sample_all(engine: Engine, token_id: int, *, now_s: float = 0.0) -> None:
    """Commit one step in which every sampling grant found `token_id`."""
    planned = engine.scheduler.plan(now_s)
    assert planned is not None
    token_ids = [token_id if samples else -1 for samples in planned.plan.samples]
    engine.receive(engine.scheduler.commit(planned, StepResult(planned.plan.step, token_ids, None, None), now_s))


def test_eos_stops() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", [3, 4], ignore_eos=False), make_submit("b", [3, 4], ignore_eos=True))
    sample_all(engine, EOS)
    (last,) = engine.answers["a"].deltas
    assert (last.token_ids, last.finish_reason, last.stop_token_id) == ([EOS], "stop", EOS)
    assert engine.answers["b"].reason is None
    assert engine.scheduler.status().n_running == 1


def test_stop_token_stops_even_when_eos_is_ignored() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", [3, 4], stop_token_ids=[7, 8]))
    sample_all(engine, 6)
    sample_all(engine, 8)
    assert engine.answers["a"].token_ids == [6, 8]
    assert (engine.answers["a"].reason, engine.answers["a"].deltas[-1].stop_token_id) == ("stop", 8)


def test_min_tokens_holds_stops_back() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", [3, 4], max_tokens=9, min_tokens=3, ignore_eos=False))
    for _ in range(3):
        sample_all(engine, EOS)
    assert (len(engine.answers["a"].token_ids), engine.answers["a"].reason) == (3, "stop")


def test_stop_at_the_last_token_counts_as_stop() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", [3, 4], max_tokens=1, ignore_eos=False))
    sample_all(engine, EOS)
    assert engine.answers["a"].reason == "stop"


def test_max_model_len_ends() -> None:
    engine = Engine(make_config(max_model_len=16), depth=2)
    engine.submit(make_submit("a", range(10), max_tokens=30))
    engine.run()
    assert (len(engine.answers["a"].token_ids), engine.answers["a"].reason) == (6, "length")


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_the_end_known_ahead_is_never_planned_beyond(max_tokens: int) -> None:
    engine = Engine(make_config(), depth=4)
    engine.submit(make_submit("a", [3, 4], max_tokens=max_tokens))
    while engine.plan() is not None:
        assert len(engine.plans) <= max_tokens
    engine.run()
    assert granted(engine) == [{"a": 2}, *[{"a": 1}] * (max_tokens - 1)]


def test_step_in_flight_after_a_stop_is_ignored() -> None:
    engine = Engine(make_config(max_seqs=1))
    engine.submit(make_submit("a", [3, 4], max_tokens=9, stop_token_ids=[7]), make_submit("b", [5, 6], max_tokens=1))
    first, second = engine.scheduler.plan(0.0), engine.scheduler.plan(0.0)
    assert first is not None
    assert second is not None
    engine.receive(engine.scheduler.commit(first, StepResult(0, [7], None, None), 0.0))
    assert engine.scheduler.pool.n_held == 0
    third = engine.scheduler.plan(0.0)  # slot and pages are reused while the second step is in flight
    assert third is not None
    assert [request.id for request in third.requests] == ["b"]
    assert third.plan.slots == second.plan.slots
    assert engine.scheduler.commit(second, StepResult(1, [9], None, None), 0.0) == {}
    engine.receive(engine.scheduler.commit(third, StepResult(2, [4], None, None), 0.0))
    assert (engine.answers["a"].token_ids, engine.answers["b"].token_ids) == ([7], [4])
    assert engine.scheduler.idle


def test_last_token_in_flight_of_a_preempted_request_ends_it() -> None:
    engine = Engine(make_config(n_pages=5, page_tokens=2, max_seqs=2), depth=5)
    submits = make_submit("a", [3, 4, 5], max_tokens=6), make_submit("b", [4, 5], max_tokens=2)
    engine.submit(*submits)
    for _ in range(5):
        assert engine.plan() is not None
    status = engine.scheduler.status()
    assert (status.n_preempted_total, status.n_running, status.n_waiting) == (1, 1, 1)
    engine.run()
    for submit in submits:
        answer = engine.answers[submit.request_id]
        assert (answer.token_ids, answer.reason) == expected_output(submit, engine.config)
    assert [start.slot for planned in engine.plans[1:] for start in planned.plan.starts] == []


# ---- abort, clients, failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_turns", [0, 1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2])
def test_abort_frees_everything_at_any_moment(n_turns: int, depth: int) -> None:
    engine = Engine(make_config(max_batched_tokens=8, n_pages=16), depth=depth)
    submits = make_submits(3, n_prompt=10, max_tokens=20)
    engine.submit(*submits)
    for _ in range(n_turns):
        engine.turn()
    engine.receive(engine.scheduler.abort(["1", "unknown", "1"]))
    assert engine.answers["1"].reason == "abort"
    assert engine.scheduler.abort(["1"]) == {}
    engine.run()
    for i in (0, 2):
        assert engine.answers[str(i)].token_ids == expected_output(submits[i], engine.config)[0]
    assert engine.scheduler.pool.n_held == 0


def test_answers_go_to_the_client_that_asked() -> None:
    engine = Engine(make_config())
    first, second = make_submits(2)
    engine.submit(first, client=b"x")
    engine.submit(second, client=b"y")
    planned = engine.plan()
    assert planned is not None
    outputs = engine.scheduler.commit(planned, engine.in_flight.pop()[1], 0.0)
    assert {client: [d.request_id for d in deltas] for client, deltas in outputs.items()} == {b"x": ["0"], b"y": ["1"]}


def test_dropped_client_takes_its_requests_along() -> None:
    engine = Engine(make_config(max_seqs=2))
    submits = make_submits(4)
    for submit, client in zip(submits, (b"x", b"y", b"x", b"y"), strict=True):
        engine.submit(submit, client=client)
    engine.plan()
    engine.scheduler.drop_client(b"x")
    engine.run()
    assert [answer.reason for answer in engine.answers.values()] == [None, "length", None, "length"]


@pytest.mark.parametrize(("step", "n_tokens"), [(1, 1), (0, 2)])
def test_result_of_another_step_is_refused(step: int, n_tokens: int) -> None:
    scheduler = Scheduler(make_config())
    scheduler.submit(make_submit("a", [3]), CLIENT, 0.0)
    planned = scheduler.plan(0.0)
    assert planned is not None
    with pytest.raises(EngineError, match="expected was step 0 with 1"):
        scheduler.commit(planned, StepResult(step, [5] * n_tokens, None, None), 0.0)


def test_commits_out_of_order_are_refused() -> None:
    engine = Engine(make_config(), depth=2)
    engine.submit(make_submit("a", [3]))
    engine.plan()
    engine.plan()
    with pytest.raises(EngineError, match="expected was step 0"):
        engine.scheduler.commit(*engine.in_flight[1], 0.0)


# ---- what is refused ---------------------------------------------------------------------------------------------


def refusal(error: type[Exception], submit: Submit, **config: int) -> str:
    scheduler = Scheduler(make_config(**config))  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        scheduler.submit(submit, CLIENT, 0.0)
    assert scheduler.idle
    return str(caught.value)


def test_prompt_that_never_fits_is_refused() -> None:
    text = refusal(InvalidRequest, make_submit("a", range(8)), n_pages=2, page_tokens=4)
    assert "8 tokens" in text
    assert "2 pages of 4" in text
    assert "num_gpu_blocks_override" in text
    Scheduler(make_config(n_pages=2, page_tokens=4)).submit(make_submit("a", range(7)), CLIENT, 0.0)


def test_prompt_without_room_for_output_is_refused() -> None:
    assert "max_model_len (16)" in refusal(ContextTooLong, make_submit("a", [1] * 16), max_model_len=16)


@pytest.mark.parametrize("prompt", [[], [-1], [16], [3, 99]])
def test_prompt_outside_the_vocabulary_is_refused(prompt: list[int]) -> None:
    assert "prompt" in refusal(InvalidRequest, make_submit("a", prompt))


def test_request_id_in_use_is_refused() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", [1]))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.submit(make_submit("a", [2]))
    engine.run()
    engine.submit(make_submit("a", [2]))


def test_too_many_waiting_are_refused() -> None:
    engine = Engine(make_config(max_seqs=1, max_waiting=2))
    first, second, third, fourth = make_submits(4)
    engine.submit(first, second)
    with pytest.raises(Overloaded, match="--scheduler-max-size allows 2"):
        engine.submit(third)
    engine.plan()
    engine.submit(third)
    with pytest.raises(Overloaded):
        engine.submit(fourth)


def test_waiting_too_long_ends_what_never_ran() -> None:
    engine = Engine(make_config(max_seqs=1, waiting_ttl_s=5.0, max_batched_tokens=8))
    first, second, third = make_submits(3, max_tokens=20)
    engine.submit(first, second)
    engine.turn()
    engine.now_s += 3.0
    engine.submit(third)
    engine.receive(engine.scheduler.expire(1005.0))
    assert engine.answers["1"].reason is None
    engine.receive(engine.scheduler.expire(1005.5))
    assert engine.answers["1"].reason == "error"
    assert "--scheduler-ttl" in (engine.answers["1"].deltas[-1].error or "")
    assert engine.answers["1"].deltas[-1].error_kind == "RequestTimeout"
    engine.run()
    assert [engine.answers[i].reason for i in "02"] == ["length", "length"]


# ---- what a delta carries ----------------------------------------------------------------------------------------


def test_times_come_with_the_first_token_and_the_end() -> None:
    engine = Engine(make_config(max_batched_tokens=8))
    engine.submit(make_submit("a", range(12), max_tokens=3))
    engine.run()
    first, middle, last = engine.answers["a"].deltas
    assert first.times is not None
    assert last.times is not None
    assert middle.times is None
    assert (first.times.received_s, first.times.first_scheduled_s, first.times.first_token_s) == (
        1000.0,
        1001.0,
        1002.0,
    )
    assert (last.times.first_token_s, last.times.last_token_s) == (1002.0, 1004.0)


def test_logprobs_are_passed_on() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", [3, 4], logprobs=0), make_submit("b", [3, 4]))
    engine.run()
    for delta in engine.answers["a"].deltas:
        assert delta.logprobs is not None
        assert [entry.token_id for entry in delta.logprobs] == delta.token_ids
    assert all(delta.logprobs is None for delta in engine.answers["b"].deltas)


@pytest.mark.parametrize("budget", [3, 5, 64])
@pytest.mark.parametrize("depth", [1, 2])
def test_prompt_logprobs_are_gathered_over_chunks(budget: int, depth: int) -> None:
    engine = Engine(make_config(max_batched_tokens=budget, max_seqs=2), depth=depth)
    prompt = [7, 3, 9, 4, 11, 2, 5, 8]
    engine.submit(make_submit("a", prompt, prompt_logprobs=0))
    engine.run()
    first, *rest = engine.answers["a"].deltas
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == prompt[1:]
    assert all(delta.prompt_logprobs is None for delta in rest)


def test_status_counts() -> None:
    engine = Engine(make_config(max_seqs=2, n_pages=16))
    engine.submit(*make_submits(3, n_prompt=8, max_tokens=2))
    engine.turn()
    status = engine.scheduler.status(1.5)
    assert (status.n_running, status.n_waiting, status.n_steps_total, status.stalled_s) == (2, 1, 1, 1.5)
    assert (status.n_running_tokens, status.n_waiting_tokens) == (18, 8)
    assert (status.n_prompt_tokens_total, status.n_generated_tokens_total) == (16, 2)
    assert (status.n_pages_free, status.n_pages_cached, status.n_pages_total) == (12, 0, 16)
    engine.run()
    status = engine.scheduler.status()
    assert (status.n_running, status.n_waiting, status.n_generated_tokens_total) == (0, 0, 6)
    assert status.n_pages_free + status.n_pages_cached == 16
