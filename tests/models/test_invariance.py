"""A request gets the same tokens whatever else the engine does: chunks, pages, batch, order, cache, preemption, lead.

The yardstick is the same request alone, in one chunk and on one page, without a prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Answer, InProcessEngine, engine_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import fed_ids, random_prompts, reference_logits
from tiny_models import Family

from fastdeploy.wire.messages import StepPlan, StepResult, TokenLogprobs

pytestmark = pytest.mark.timeout(600)  # finding the smallest example of a failure takes a while

GetModel = Callable[..., Path]
FAMILIES: tuple[Family, ...] = ("ernie4_5_moe", "qwen3_moe", "llama")
MAX_MODEL_LEN = 160
N_EXAMPLES = 12  # 400 of each were searched when this was written
search = settings(
    max_examples=N_EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Beginnings that prompts share: two different ones, and one that goes on where another ends.
TRUNKS = random_prompts([20, 33], seed=5)
TRUNKS.append(TRUNKS[0] + random_prompts([30], seed=6)[0])


@dataclass(frozen=True)
class Wanted:
    """One request: `n_shared` tokens of a trunk, then `n_own` of its own."""

    trunk: int
    n_shared: int
    n_own: int
    seed: int
    max_tokens: int
    arrives_at: int
    sampling: tuple[tuple[str, Any], ...]

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt, never empty."""
        own = random_prompts([self.n_own], seed=self.seed)[0]
        return (TRUNKS[self.trunk][: self.n_shared] + own) or [7]

    @property
    def params(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "seed": self.seed, **dict(self.sampling)}


GREEDY: tuple[tuple[str, Any], ...] = (("temperature", 0.0),)
SAMPLED: list[tuple[tuple[str, Any], ...]] = [
    (("temperature", 1.0),),
    (("temperature", 0.8), ("top_p", 0.9)),
    (("temperature", 1.5), ("top_k", 20), ("min_p", 0.01)),
    (("temperature", 1.0), ("repetition_penalty", 1.3), ("presence_penalty", 0.5), ("frequency_penalty", 0.2)),
]


def requests(sampling: st.SearchStrategy[tuple[tuple[str, Any], ...]]) -> st.SearchStrategy[list[Wanted]]:
    """One to six requests."""
    wanted = st.builds(
        Wanted,
        trunk=st.integers(0, len(TRUNKS) - 1),
        n_shared=st.integers(0, 50),
        n_own=st.integers(0, 12),
        seed=st.integers(0, 5),
        max_tokens=st.integers(1, 24),
        arrives_at=st.integers(0, 12),
        sampling=sampling,
    )
    return st.lists(wanted, min_size=1, max_size=6)


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `engine_config`; `spare_pages` is turned into `n_pages` by `build`."""
    max_seqs = draw(st.integers(1, 6))
    n_partial = draw(st.integers(1, 3))
    return {
        "max_seqs": max_seqs,
        "max_batched_tokens": draw(st.integers(max_seqs, 60) | st.just(512)),
        "page_tokens": draw(st.integers(1, 9) | st.integers(1, 64)),
        "prefix_caching": draw(st.booleans()),
        "max_partial_prefills": n_partial,
        "max_long_partial_prefills": draw(st.integers(1, n_partial)),
        "long_prefill_tokens": draw(st.sampled_from([0, 16])),
        "steps_in_flight": draw(st.integers(1, 3)),
        "spare_pages": draw(st.integers(0, 4) | st.just(1000)),
    }


def build(folder: Path, wanted: list[Wanted], options: dict[str, Any]) -> InProcessEngine:
    """An engine whose pages hold the longest request, and a few more."""
    n_longest = max(len(w.prompt_ids) + w.max_tokens for w in wanted)
    n_pages = -(-n_longest // options["page_tokens"]) + options["spare_pages"]
    rest = {key: value for key, value in options.items() if key != "spare_pages"}
    return InProcessEngine(engine_config(folder, max_model_len=MAX_MODEL_LEN, n_pages=n_pages, **rest))


def serve(engine: InProcessEngine, wanted: list[Wanted]) -> list[list[int]]:
    """The tokens of each request."""
    answers = engine.generate(
        [w.prompt_ids for w in wanted], [w.params for w in wanted], [w.arrives_at for w in wanted]
    )
    assert engine.scheduler.status().n_pages_free + engine.scheduler.status().n_pages_cached == engine.runner.n_pages
    return [answer.token_ids for answer in answers]


@lru_cache
def lone_engine(folder: Path) -> InProcessEngine:
    """One request at a time, one page each."""
    config = engine_config(folder, max_model_len=MAX_MODEL_LEN, page_tokens=256, prefix_caching=False, max_seqs=1)
    return InProcessEngine(config)


@lru_cache(maxsize=4096)
def alone(folder: Path, wanted: Wanted) -> list[int]:
    """The yardstick."""
    return lone_engine(folder).generate([wanted.prompt_ids], **wanted.params)[0].token_ids


def check(folder: Path, wanted: list[Wanted], options: dict[str, Any]) -> None:
    """The tokens of all requests together are those of each alone, and again with whatever the cache holds then."""
    engine, expected = build(folder, wanted, options), [alone(folder, w) for w in wanted]
    assert serve(engine, wanted) == expected
    assert serve(engine, wanted[::-1]) == expected[::-1]


@pytest.mark.parametrize("family", FAMILIES)
@search
@given(wanted=requests(st.just(GREEDY)), options=engines())
def test_greedy_tokens(tiny_model: GetModel, family: Family, wanted: list[Wanted], options: dict[str, Any]) -> None:
    check(tiny_model(family), wanted, options)


@search
@given(wanted=requests(st.sampled_from([*SAMPLED, GREEDY])), options=engines())
def test_seeded_tokens(tiny_model: GetModel, wanted: list[Wanted], options: dict[str, Any]) -> None:
    check(tiny_model("ernie4_5_moe"), wanted, options)


def crowd(n: int, sampling: tuple[tuple[str, Any], ...] = GREEDY) -> list[Wanted]:
    """Requests that begin alike and outgrow a small cache together."""
    return [Wanted(i % 3, 18 + i, 3, i, 40, i // 2, sampling) for i in range(n)]


@pytest.mark.parametrize("steps_in_flight", [1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, *SAMPLED])
def test_preemption_changes_nothing(
    tiny_model: GetModel, steps_in_flight: int, sampling: tuple[tuple[str, Any], ...]
) -> None:
    folder, wanted = tiny_model("ernie4_5_moe"), crowd(6, sampling)
    options = {"max_seqs": 5, "max_batched_tokens": 30, "page_tokens": 4, "steps_in_flight": steps_in_flight}
    engine = build(folder, wanted, {**options, "spare_pages": 8})
    assert serve(engine, wanted) == [alone(folder, w) for w in wanted]
    status = engine.scheduler.status()
    assert status.n_preempted_total > 0 and status.n_cached_tokens_total > 0


def test_the_seed_matters(tiny_model: GetModel) -> None:
    """Otherwise equal samples would say nothing."""
    folder = tiny_model("ernie4_5_moe")
    answers = {tuple(alone(folder, Wanted(0, 20, 0, seed, 24, 0, SAMPLED[0]))) for seed in range(6)}
    assert len(answers) == 6


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def check_entry(entry: TokenLogprobs, token_id: int, logprobs_V: torch.Tensor, n_top: int) -> None:
    """One position against the reference's log-probabilities; ranks of near-equal tokens may differ."""
    assert entry.token_id == token_id
    assert entry.logprob == pytest.approx(logprobs_V[token_id].item(), abs=1e-4)
    n_above = int((logprobs_V > logprobs_V[token_id] + 1e-4).sum())
    n_not_below = int((logprobs_V > logprobs_V[token_id] - 1e-4).sum())
    assert n_above < entry.rank <= n_not_below
    assert len(set(entry.top_ids)) == len(entry.top_ids) == n_top
    best_n = logprobs_V.topk(n_top).values
    assert torch.tensor(entry.top_logprobs) == pytest.approx(best_n, abs=1e-4)
    assert logprobs_V[entry.top_ids] == pytest.approx(best_n, abs=1e-4)


def check_logprobs(model: Any, answer: Answer, n_top: int, n_prompt_top: int | None) -> None:
    """All entries of an answer."""
    ids, n_prompt = fed_ids(answer), len(answer.prompt_ids)
    logprobs_pV = reference_logits(model, [ids])[0].log_softmax(-1)
    assert len(answer.logprobs) == len(answer.token_ids)
    for i, (entry, token_id) in enumerate(zip(answer.logprobs, answer.token_ids, strict=True)):
        check_entry(entry, token_id, logprobs_pV[n_prompt - 1 + i], n_top)
    if n_prompt_top is None:
        assert answer.prompt_logprobs is None
        return
    assert answer.prompt_logprobs is not None and answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == n_prompt
    for position, entry_or_none in enumerate(answer.prompt_logprobs[1:], 1):
        assert entry_or_none is not None
        check_entry(entry_or_none, ids[position], logprobs_pV[position - 1], n_prompt_top)


@pytest.mark.parametrize("steps_in_flight", [1, 3])
@pytest.mark.parametrize("family", ["ernie4_5_moe", "qwen3"])
def test_logprobs_are_those_of_the_reference(
    tiny_model: GetModel, reference: Callable[[Path], Any], family: Family, steps_in_flight: int
) -> None:
    """Chunked prompts, a warm prefix cache and preemption; requests with and without, greedy and sampled, mixed."""
    folder = tiny_model(family)
    wanted = crowd(6) + crowd(3, SAMPLED[1])
    options = {"max_seqs": 5, "max_batched_tokens": 11, "page_tokens": 4, "spare_pages": 8}
    engine = build(folder, wanted, {**options, "steps_in_flight": steps_in_flight})
    asked: list[tuple[int, int | None]] = [
        (0, 3),
        (5, None),
        (3, 0),
        (128, 2),
        (1, None),
        (2, 7),
        (4, 1),
        (0, None),
        (5, 5),
    ]
    for _ in range(2):  # the second time every beginning is cached
        params = [
            {**w.params, "logprobs": n_top, "prompt_logprobs": n_prompt_top}
            for w, (n_top, n_prompt_top) in zip(wanted, asked, strict=True)
        ]
        answers = engine.generate([w.prompt_ids for w in wanted], params, [w.arrives_at for w in wanted])
        assert [answer.token_ids for answer in answers] == [alone(folder, w) for w in wanted]
        for answer, (n_top, n_prompt_top) in zip(answers, asked, strict=True):
            check_logprobs(reference(folder), answer, n_top, n_prompt_top)
    assert engine.scheduler.status().n_preempted_total > 0
    assert any(answer.n_cached_tokens for answer in answers)


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_prompt_logprobs_of_a_prompt_that_starts_twice(
    tiny_model: GetModel,
    reference: Callable[[Path], Any],
    steps_in_flight: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoding requests take the pages of a prompt that is midway: it starts anew, and no position is told twice."""
    folder = tiny_model("ernie4_5_moe")
    prompts = random_prompts([4, 5, 6, 40], seed=9)
    params: list[dict[str, Any]] = [{"max_tokens": 40}] * 3 + [{"max_tokens": 4, "logprobs": 1, "prompt_logprobs": 3}]
    config = engine_config(
        folder, max_seqs=4, max_batched_tokens=5, page_tokens=4, n_pages=26, steps_in_flight=steps_in_flight
    )
    engine = InProcessEngine(config)
    launch, n_starts = engine.runner.launch, 0

    def counted(plan: StepPlan) -> Callable[[], StepResult]:
        nonlocal n_starts
        n_starts += sum(start.token_ids == prompts[3] for start in plan.starts)
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", counted)
    answers = engine.generate(prompts, params, [0, 0, 0, 8])
    assert n_starts > 1
    check_logprobs(reference(folder), answers[3], 1, 3)
    assert [answer.token_ids for answer in answers] == [
        lone_engine(folder).generate([prompt], max_tokens=p["max_tokens"])[0].token_ids
        for prompt, p in zip(prompts, params, strict=True)
    ]
