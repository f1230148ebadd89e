"""A server without a model: its settings, its pace, its tokens."""

import pytest

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import SyntheticConfig
from fastdeploy.errors import ConfigError, InvalidRequest
from fastdeploy.executor.synthetic import SyntheticRunner, made_up_answer, step_s
from fastdeploy.frontend.byte_tokenizer import byte_tokenizer
from fastdeploy.frontend.params import checked_params
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import SlotStart, StepPlan


def synthetic(**flags: object) -> EngineArgs:
    return EngineArgs.from_kwargs(load_choices="synthetic", **flags)


def test_no_model_is_needed() -> None:
    config = resolve(synthetic(synthetic_config={"step_ms": 2}), {})
    assert config.model.synthetic == SyntheticConfig(step_ms=2.0)
    assert (config.model.served_name, config.model.shape.vocab_size) == ("synthetic", 257)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"synthetic_config": {"step": 1}}, "'step' is none of"),
        ({"synthetic_config": {"step_ms": 0}}, "must be above 0"),
        ({"synthetic_config": {"step_ms": -1}}, "step_ms = -1"),
        ({"synthetic_config": {"sequence_ms": "fast"}}, "sequence_ms = 'fast'"),
        ({"synthetic_config": {"prompt_token_ms": 1e9}}, "0..60000"),
        ({"enable_expert_parallel": True, "data_parallel_size": 2}, "--enable-expert-parallel"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"tokenizer": "."}, "--tokenizer"),
        ({"model": "/nowhere"}, "--model /nowhere"),
    ],
)
def test_nonsense_is_refused(flags: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve(synthetic(**flags), {})


def test_a_pace_without_a_synthetic_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="only --load-choices synthetic"):
        resolve(EngineArgs.from_kwargs(model=".", synthetic_config={}), {})


def test_probabilities_are_refused() -> None:
    config = resolve(synthetic(), {})
    with pytest.raises(InvalidRequest, match="computes no probabilities"):
        checked_params(SamplingParams(logprobs=0), config, byte_tokenizer())


def test_a_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a\u00e9!")
    assert ids == [97, 195, 169, 33]
    assert tokenizer.decode(ids) == "a\u00e9!"
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("\ud800")


def test_a_step_costs_what_was_set() -> None:
    pace = SyntheticConfig(step_ms=10, prompt_token_ms=0.5, sequence_ms=2)
    plan = StepPlan(0, [], [0, 1, 2], [1, 1, 100], [True, True, False], [[], [], []])
    assert step_s(pace, plan) == pytest.approx((10 + 2 * 2 + 100 * 0.5) / 1000)


def test_tokens_depend_on_prompt_and_position_alone() -> None:
    runner = SyntheticRunner(resolve(synthetic(), {}))
    prompt = [*b"a prompt", 256]
    expected = made_up_answer(prompt, 5, {256})
    assert 256 not in expected
    assert made_up_answer([*prompt, 7], 5, {256}) != expected

    def start(known: list[int]) -> SlotStart:
        return SlotStart(3, known, len(prompt), 0, [0], SamplingParams())

    def step(starts: list[SlotStart], n_tokens: int, samples: bool) -> list[int]:
        return runner.run(StepPlan(0, starts, [3], [n_tokens], [samples], [[]])).token_ids

    assert step([start(prompt)], 4, False) == [-1]  # the prompt comes in pieces
    found = step([], 5, True) + step([], 1, True)
    found += step([start(prompt + found)], len(prompt) + 2, True)  # it was preempted
    assert found == expected[:3]
