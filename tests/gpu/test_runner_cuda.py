"""The runner on a GPU: the same tokens from graphs, kernel by kernel, in any batch, and from the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Answer, InProcessEngine, engine_config

pytestmark = pytest.mark.timeout(600)

TinyModel = Callable[..., Path]
FAMILIES = ["ernie4_5", "qwen3", "ernie4_5_moe", "qwen3_moe"]


def gpu_engine(folder: Path, *, graphs: bool = True, dtype: str = "float32", **options: Any) -> InProcessEngine:
    """An engine on the GPU, two steps in flight unless `options` say otherwise."""
    config = engine_config(folder, **{"steps_in_flight": 2, "max_seqs": 24, **options})
    engine = InProcessEngine(replace(config, model=replace(config.model, device="cuda", dtype=dtype)))
    if graphs:
        engine.runner.warm_up()
    else:
        engine.runner._captured = None
    return engine


def random_prompts(n: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 90) for _ in range(draw.randint(1, longest))] for _ in range(n)]


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_the_tokens_of_eager_steps_and_of_the_cpu(tiny_model: TinyModel, family: str) -> None:
    folder, prompts = tiny_model(family), random_prompts(20)
    arrive_at = [i // 3 for i in range(20)]
    options: dict[str, Any] = {"max_batched_tokens": 64}
    found = tokens(gpu_engine(folder, **options).generate(prompts, arrive_at=arrive_at, max_tokens=20))
    eager = tokens(gpu_engine(folder, graphs=False, **options).generate(prompts, arrive_at=arrive_at, max_tokens=20))
    on_cpu = tokens(InProcessEngine(engine_config(folder)).generate(prompts, max_tokens=20))
    assert found == eager
    assert found == on_cpu


def test_a_request_alone_gets_the_tokens_it_gets_among_many(tiny_model: TinyModel) -> None:
    engine, prompts = gpu_engine(tiny_model("ernie4_5")), random_prompts(24, seed=1)
    together = tokens(engine.generate(prompts, max_tokens=16))
    alone = [tokens(engine.generate([prompt], max_tokens=16))[0] for prompt in prompts[:6]]
    assert together[:6] == alone


def test_sizes_captured_while_serving_change_nothing(tiny_model: TinyModel) -> None:
    engine, prompts = gpu_engine(tiny_model("ernie4_5")), random_prompts(5, seed=2)
    first = tokens(engine.generate(prompts, max_tokens=30))
    n_captured = 0
    while engine.runner.use_idle_time():
        n_captured += 1
    assert n_captured > 0
    assert tokens(engine.generate(prompts, max_tokens=30)) == first


def test_what_needs_more_than_the_likeliest_token_runs_ahead_too(tiny_model: TinyModel) -> None:
    params: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 5, "seed": 4},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 3},
        {"prompt_logprobs": 2},
        {"min_tokens": 6, "stop_token_ids": list(range(40))},
        {"logits_processors_args": {"logit_bias": {"7": 50.0}}},
        {},
    ]
    prompts = random_prompts(len(params), seed=5)
    engines = [
        gpu_engine(tiny_model("ernie4_5")),
        gpu_engine(tiny_model("ernie4_5"), graphs=False, steps_in_flight=1),
        InProcessEngine(engine_config(tiny_model("ernie4_5"))),
    ]
    found = [engine.generate(prompts, params, max_tokens=12) for engine in engines]
    for answers in found[1:]:
        assert tokens(answers) == tokens(found[0])
        ids = [[entry.token_id for entry in answer.logprobs] for answer in answers]
        assert ids == [[entry.token_id for entry in answer.logprobs] for answer in found[0]]
        for mine, theirs in zip(answers[3].logprobs, found[0][3].logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    alone = [engines[0].generate([prompts[i]], [params[i]], max_tokens=12)[0] for i in range(len(params))]
    assert tokens(alone) == tokens(found[0])


def test_preempted_requests_and_reused_pages(tiny_model: TinyModel) -> None:
    folder, prompts = tiny_model("ernie4_5"), random_prompts(8, longest=30, seed=6)
    roomy = tokens(gpu_engine(folder).generate(prompts, max_tokens=60))
    tight = gpu_engine(folder, n_pages=14, max_seqs=8, prefix_caching=False)
    assert tokens(tight.generate(prompts, max_tokens=60)) == roomy
    assert tight.scheduler.status().n_preempted_total > 0


def test_bfloat16_runs_from_graphs_as_it_does_eagerly(tiny_model: TinyModel) -> None:
    folder, prompts = tiny_model("ernie4_5", dtype="bfloat16"), random_prompts(8, seed=7)
    # One size of step only, so that no matrix product is rounded in another way.
    found = tokens(gpu_engine(folder, dtype="bfloat16", max_seqs=8).generate(prompts, max_tokens=24))
    eager = tokens(gpu_engine(folder, dtype="bfloat16", max_seqs=8, graphs=False).generate(prompts, max_tokens=24))
    same = sum(a == b for mine, theirs in zip(found, eager, strict=True) for a, b in zip(mine, theirs, strict=True))
    assert same >= 0.8 * 8 * 24
