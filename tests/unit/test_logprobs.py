"""Reported log-probabilities against torch in float64, in every mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeploy.config.schema import LogprobsMode
from fastdeploy.runner import logprobs as logprobs_module
from fastdeploy.runner.logprobs import prompt_logprobs
from fastdeploy.runner.sampler import Sampler
from fastdeploy.runner.sampling_state import SamplingState
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import TokenLogprobs

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": 7,
    "min_tokens": 0,
}


def sample(
    logits_sV: Tensor, kinds: list[dict[str, Any]], mode: LogprobsMode = "raw_logprobs"
) -> tuple[list[int], list[TokenLogprobs | None]]:
    state = SamplingState(len(kinds), logits_sV.shape[1], CPU, (0,))
    for slot, kind in enumerate(kinds):
        state.start(slot, SamplingParams(**{**DEFAULTS, **kind}), [1, 2, 2], 1)
    rows = list(range(len(kinds)))
    sampled = Sampler(mode).sample(logits_sV, state.batch(rows, [2] * len(rows)))
    assert sampled.logprobs is not None
    return sampled.token_ids_s.tolist(), sampled.logprobs.read()


def check(entry: TokenLogprobs | None, scores_V: Tensor, token_id: int, n_top: int) -> None:
    """`scores_V`: float64, what should be reported of each token."""
    assert entry is not None
    values = scores_V.tolist()
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    assert entry.token_id == token_id
    assert entry.rank == 1 + sum(value > values[token_id] for value in values)
    assert entry.top_ids == order[:n_top]
    assert [entry.logprob, *entry.top_logprobs] == pytest.approx(
        [values[token_id], *(values[token] for token in order[:n_top])], abs=1e-6, rel=1e-7
    )


def logits_of(n_rows: int, vocab_size: int, scale: float = 3.0) -> Tensor:
    return torch.randn(n_rows, vocab_size, generator=torch.Generator().manual_seed(n_rows)) * scale


N_TOP = [0, 3, None, -1, 1, 3, 500]
KINDS: list[dict[str, Any]] = [
    {"logprobs": n, "temperature": t, "seed": i, "repetition_penalty": 1.5, "bad_words_token_ids": [4]}
    for i, (n, t) in enumerate(zip(N_TOP, [0.0, 1.0, 1.0, 0.5, 2.0, 0.0, 1.3], strict=True))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits"])
def test_raw_modes_report_the_model(mode: LogprobsMode, dtype: torch.dtype) -> None:
    vocab_size = 40
    logits = logits_of(len(KINDS), vocab_size).to(dtype)
    token_ids, entries = sample(logits, KINDS, mode)
    for row, n_top in enumerate(N_TOP):
        scores = logits[row].double()
        if mode == "raw_logprobs":
            scores = torch.log_softmax(scores, -1)
        if n_top is None:
            assert entries[row] is None
        else:
            check(entries[row], scores, token_ids[row], vocab_size if n_top < 0 else min(n_top, vocab_size))


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_processed_modes_report_what_was_drawn_from(mode: LogprobsMode) -> None:
    vocab_size = 12
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "bad_words_token_ids": [3]},
        {"temperature": 0.5, "presence_penalty": 1.0},
        {"temperature": 2.0, "top_k": 4},
        {"temperature": 0.8, "top_p": 0.7},
        {"min_p": 0.2},
    ]
    logits = logits_of(len(kinds), vocab_size)
    token_ids, entries = sample(logits, [{**kind, "logprobs": -1} for kind in kinds], mode)
    expected = logits.double()
    expected[0, 3] = -math.inf
    expected[1, 2] -= 1.0
    expected[1] /= 0.5
    expected[2] = (expected[2] / 2.0).where(expected[2] >= expected[2].sort().values[-4], -math.inf)
    expected[3] /= float(torch.tensor(0.8))
    order = expected[3].argsort(descending=True)
    before = torch.softmax(expected[3], -1)[order].cumsum(-1).roll(1)
    before[0] = 0
    expected[3, order[before >= 0.7]] = -math.inf
    expected[4] = expected[4].where(expected[4] >= expected[4].max() + math.log(0.2), -math.inf)
    if mode == "processed_logprobs":
        expected = torch.log_softmax(expected, -1)
    for row, entry in enumerate(entries):
        assert expected[row].isinf().any() or row == 1
        check(entry, expected[row], token_ids[row], vocab_size)


def test_processed_modes_in_a_batch_without_draws() -> None:
    token_ids, entries = sample(logits_of(1, 9), [{"temperature": 0.0, "logprobs": 2}], "processed_logprobs")
    check(entries[0], torch.log_softmax(logits_of(1, 9)[0].double(), -1), token_ids[0], 2)


def test_scaled_and_renormalised_as_each_request_wants() -> None:
    vocab_size = 300
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.5, "temp_scaled_logprobs": True},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_p": 0.8, "top_p_normalized_logprobs": True},
        {"temperature": 2.0, "top_p": 0.99, "top_p_normalized_logprobs": True, "temp_scaled_logprobs": True},
        {"temperature": 0.0, "temp_scaled_logprobs": True},
        {"top_p": 1.0, "top_p_normalized_logprobs": True},
        {"logprobs": None, "top_p": 0.9},
    ]
    logits = logits_of(len(kinds), vocab_size, scale=1.0)
    token_ids, entries = sample(logits, [{"logprobs": -1, **kind} for kind in kinds])
    for row, kind in enumerate(kinds[:-1]):
        scores = logits[row].double()
        if kind.get("temp_scaled_logprobs") and kind["temperature"] > 0:
            scores = scores / kind["temperature"]
        if kind.get("top_p_normalized_logprobs") and kind["top_p"] < 1:
            order = scores.argsort(descending=True)
            probabilities = torch.softmax(scores, -1)[order]
            cut = order[probabilities.cumsum(-1) - probabilities >= kind["top_p"]]
            assert 0 < len(cut) < vocab_size
            scores[cut] = -math.inf
        check(entries[row], torch.log_softmax(scores, -1), token_ids[row], vocab_size)
    assert entries[-1] is None


def test_equal_logits_share_a_rank_and_stand_by_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0]])
    _, (entry,) = sample(logits, [{"temperature": 0.0, "logprobs": 5}])
    assert entry is not None and entry.rank == 1 and entry.top_ids == [1, 2, 0, 3, 4]
    assert prompt_logprobs(logits, torch.tensor([2]), 0)[0].rank == 1
    assert prompt_logprobs(logits, torch.tensor([3]), 0)[0].rank == 4


@pytest.mark.parametrize("row", [[-math.inf, 0.0, 1.0], [-math.inf] * 3, [1e4, -1e4, 0.0], [0.5]])
def test_never_nan(row: list[float]) -> None:
    logits = torch.tensor([row])
    for token in range(len(row)):
        (entry,) = prompt_logprobs(logits, torch.tensor([token]), -1)
        assert not math.isnan(entry.logprob) and not any(map(math.isnan, entry.top_logprobs))
        assert (entry.logprob == -math.inf) == (row[token] == -math.inf)


@pytest.mark.parametrize("n_top", [0, 2, -1, 100])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 25 * 3, 1 << 20])
def test_prompt_positions(n_top: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "_CHUNK_BYTES", chunk_bytes)
    logits = logits_of(7, 25).bfloat16()
    next_ids = torch.arange(3, 10)
    entries = prompt_logprobs(logits, next_ids, n_top)
    assert len(entries) == 7
    for position, entry in enumerate(entries):
        scores = torch.log_softmax(logits[position].double(), -1)
        check(entry, scores, int(next_ids[position]), 25 if n_top < 0 else min(n_top, 25))
    assert prompt_logprobs(logits, next_ids, 1, "raw_logits")[2].logprob == float(logits[2, 5])
    assert prompt_logprobs(logits[:0], next_ids[:0], n_top) == []


def test_large_vocabulary_is_as_exact_as_float64() -> None:
    logits = logits_of(2, 60_000, scale=0.5)
    entries = prompt_logprobs(logits, torch.tensor([0, 59_999]), 20)
    for row, (token, entry) in enumerate(zip([0, 59_999], entries, strict=True)):
        check(entry, torch.log_softmax(logits[row].double(), -1), token, 20)
