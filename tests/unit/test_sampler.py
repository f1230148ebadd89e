"""The sampler against a slow reference that handles one row at a time, and against the distribution it promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_reference import CPU, EOS, params, reference_logits, reference_probabilities, sample_ids, state_of
from transformers import RepetitionPenaltyLogitsProcessor

from fastdeploy.runner import sampler as sampler_module
from fastdeploy.runner.sampler import Sampler, draw_rows, edit_logits
from fastdeploy.runner.sampling_state import SamplingState, counter_uniforms
from fastdeploy.sampling_params import ParamValueError, SamplingParams

pytestmark = pytest.mark.timeout(120)

# ---- stages against the reference --------------------------------------------------------------------------------


@st.composite
def requests(draw_: st.DrawFn, vocab_size: int) -> SamplingParams:
    token = st.integers(0, vocab_size - 1)
    return params(
        temperature=draw_(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5])),
        top_k=draw_(st.sampled_from([0, -1, 1, 2, 5, 1000])),
        top_p=draw_(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        min_p=draw_(st.sampled_from([0.0, 0.0, 0.05, 0.5])),
        seed=draw_(st.integers(0, 1 << 40)),
        repetition_penalty=draw_(st.sampled_from([1.0, 1.3, 0.7])),
        frequency_penalty=draw_(st.sampled_from([0.0, 0.5, -1.0])),
        presence_penalty=draw_(st.sampled_from([0.0, 0.7])),
        min_tokens=draw_(st.integers(0, 3)),
        stop_token_ids=draw_(st.none() | st.lists(token, max_size=2)),
        ignore_eos=draw_(st.booleans()),
        bad_words_token_ids=draw_(st.none() | st.lists(token, max_size=3)),
        logits_processors_args=draw_(
            st.none()
            | st.fixed_dictionaries({"logit_bias": st.dictionaries(token.map(str), st.floats(-5, 5), max_size=3)})
        ),
    )


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_every_stage_matches_the_reference(data: st.DataObject) -> None:
    vocab_size = 12
    n_rows = data.draw(st.integers(1, 5))
    all_params = [data.draw(requests(vocab_size)) for _ in range(n_rows)]
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6)
    tokens = [(prompt := data.draw(ids)) and (prompt + data.draw(ids), len(prompt)) for _ in range(n_rows)]
    logits = torch.randn(n_rows, vocab_size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 2
    unchanged = logits.clone()
    state = state_of(all_params, vocab_size, tokens)
    positions = [len(ids) - n_prompt for ids, n_prompt in tokens]
    batch = state.batch(list(range(n_rows)), positions)
    edited = edit_logits(logits, batch.layout)
    taken = Sampler().sample(logits, batch).token_ids_s
    assert torch.equal(logits, unchanged)
    for row, p in enumerate(all_params):
        expected = reference_logits(logits[row], p, *tokens[row], positions[row])
        torch.testing.assert_close(edited[row].double(), expected, rtol=1e-5, atol=1e-5)
        if expected.isfinite().any():
            assert reference_probabilities(edited[row].double(), p)[int(taken[row])] > 0
        else:
            assert taken[row] == logits[row].argmax()


def test_penalties_follow_the_tokens_sampled() -> None:
    """After k steps on the device the penalties are those of a request that starts with these k tokens."""
    vocab_size, p = 9, params(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3)
    logits = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(3)).abs()
    state = state_of([p, params(temperature=0.0)], vocab_size, [([1, 2], 2), ([3], 1)])
    ids = [1, 2]
    for position in range(6):
        (token, plain) = sample_ids(logits, state, [0, 1], [position, position])
        expected = reference_logits(logits[0], p, ids, 2, position)
        assert token == int(expected.argmax())
        assert plain == int(logits[1].argmax())
        ids.append(token)
    assert len(set(ids[2:])) > 1
    state.start(0, p, ids, 2)  # resumes after a preemption
    resumed = edit_logits(logits, state.batch([0, 1], [6, 6]).layout)[0]
    torch.testing.assert_close(resumed.double(), reference_logits(logits[0], p, ids, 2, 6), rtol=1e-6, atol=1e-6)


def test_a_slot_forgets_its_last_request() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.0]])
    state = state_of([params(temperature=0.0, frequency_penalty=2.0, bad_words_token_ids=[2])], 4, [([1, 1, 1], 1)])
    assert sample_ids(logits, state, [0], [2]) == [3]
    state.start(0, params(temperature=0.0), [1], 1)
    assert sample_ids(logits, state, [0], [0]) == [1]
    state.start(0, params(temperature=0.0, frequency_penalty=2.0), [1], 1)
    assert sample_ids(logits, state, [0], [0]) == [1]  # nothing counted from before


def test_penalty_history_grows_and_gives_rows_back() -> None:
    penal = params(temperature=0.0, presence_penalty=2.0)
    state = state_of([penal] * 6, 5, [([1, slot % 5], 1) for slot in range(6)])
    for slot in range(6):
        state.start(slot, penal, [1, slot % 5], 1)
    assert state.history.n_output_hV.shape == (8, 5)
    edited = edit_logits(torch.zeros(6, 5), state.batch(list(range(6)), [1] * 6).layout)
    assert edited.argmin(-1).tolist() == [0, 1, 2, 3, 4, 0]
    for slot in range(6):
        state.start(slot, params(), [1], 1)
    with pytest.raises(KeyError):
        state.history.rows([0])
    for slot in range(5, -1, -1):
        state.start(slot, penal, [1, 2], 1)
    assert state.history.n_output_hV.shape == (8, 5)
    assert edit_logits(torch.zeros(6, 5), state.batch(list(range(6)), [1] * 6).layout).argmin(-1).tolist() == [2] * 6


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_repetition_penalty_is_that_of_transformers(data: st.DataObject) -> None:
    vocab_size = 20
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=10))
    n_prompt = data.draw(st.integers(1, len(ids)))
    penalty = data.draw(st.floats(0.2, 3))
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 3
    state = state_of([params(repetition_penalty=penalty)], vocab_size, [(ids, n_prompt)])
    mine = edit_logits(logits, state.batch([0], [len(ids) - n_prompt]).layout)
    theirs = RepetitionPenaltyLogitsProcessor(penalty=penalty)(torch.tensor([ids]), logits.clone())
    if penalty != 1:
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_min_tokens_bans_eos_and_stop_tokens_until_reached() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    state = state_of([params(temperature=0.0, min_tokens=2, stop_token_ids=[1, 99])], 4)
    assert [sample_ids(logits, state, [0], [position])[0] for position in range(4)] == [2, 2, 0, 0]
    state = state_of([params(temperature=0.0, min_tokens=2, stop_token_ids=[1], ignore_eos=True)], 4)
    assert sample_ids(logits, state, [0], [0]) == [0]


def test_ids_outside_the_vocabulary_are_without_effect() -> None:
    wild = params(
        temperature=0.0,
        bad_words_token_ids=[-1, 4, 1 << 40],
        stop_token_ids=[77],
        logits_processors_args={"logit_bias": {"-3": 9.0, "4": 9.0}},
        repetition_penalty=2.0,
    )
    state = state_of([wild], 4, [([1, 77, 2, -1], 2)])
    assert edit_logits(torch.ones(1, 4), state.batch([0], [2]).layout).tolist() == [[1.0, 0.5, 0.5, 1.0]]


@pytest.mark.parametrize("bias", [math.inf, -math.inf, math.nan, 1e38, -1e38])
def test_any_bias_leaves_a_valid_token(bias: float) -> None:
    wild = params(logits_processors_args={"logit_bias": {"1": bias, "2": bias}})
    taken = {sample_ids(torch.zeros(1, 4), state_of([wild], 4), [0], [position])[0] for position in range(60)}
    assert taken == ({1, 2} if bias > 0 else {0, 1, 2, 3} if math.isnan(bias) else {0, 3})


# ---- the draw ----------------------------------------------------------------------------------------------------


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05, "bad_words_token_ids": [2, 3]},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_tokens_come_with_their_probability(fields: dict[str, Any]) -> None:
    vocab_size, n_draws = 16, 6000
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(11)) * 1.5
    p = params(seed=1234, **fields)
    expected = np.array(reference_probabilities(reference_logits(logits[0], p, [0], 1, 0), p)) * n_draws
    batch = state_of([p], vocab_size).batch([0], [0])
    assert batch.layout.random is not None
    uniforms = counter_uniforms(np.full(n_draws, 1234, dtype=np.uint64), np.arange(n_draws, dtype=np.uint64))
    counts = np.zeros(vocab_size)
    for position in range(0, n_draws, 2000):  # one request's positions as rows of one call
        state = SamplingState(2000, vocab_size, CPU, (EOS,))
        for slot in range(2000):
            state.start(slot, p, [0], 1)
        wide = state.batch(list(range(2000)), list(range(position, position + 2000)))
        assert wide.uniforms_r is not None
        np.testing.assert_array_equal(wide.uniforms_r.numpy(), uniforms[position : position + 2000])
        counts += np.bincount(Sampler().sample(logits.expand(2000, -1), wide).token_ids_s, minlength=vocab_size)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom) + 4, (counts, expected)


def test_uniforms_are_spread_and_unrelated() -> None:
    n = 20_000
    streams = {
        "positions": counter_uniforms(np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64)),
        "seeds": counter_uniforms(np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)),
        "next seed": counter_uniforms(np.ones(n, np.uint64), np.arange(n, dtype=np.uint64)),
    }
    for name, u in streams.items():
        counts = np.histogram(u, bins=50, range=(0, 1))[0]
        assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 49 + 5 * math.sqrt(98), name
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(n), name
        assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == n
    assert abs(np.corrcoef(streams["positions"], streams["next seed"])[0, 1]) < 5 / math.sqrt(n)


# ---- reproducibility ---------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_the_batch_does_not_change_a_token(data: st.DataObject) -> None:
    """Each request alone, and any subset in any order, in any slots, gives the same token."""
    vocab_size = 3000
    kinds = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "min_p": 0.02},
        {"top_k": 300},
        {"top_p": 0.9},
        {"top_p": 0.97, "temperature": 4.0},  # a nucleus beyond the first candidates
        {"top_k": 40, "top_p": 0.8},
        {"frequency_penalty": 1.0},
    ]
    all_params = [params(seed=100 + i, **kind) for i, kind in enumerate(kinds)]
    seed = data.draw(st.integers(0, 1 << 30))
    logits = (torch.randn(len(kinds), vocab_size, generator=torch.Generator().manual_seed(seed)) * 2).bfloat16()
    position = data.draw(st.integers(0, 5000))
    alone = []
    for i, p in enumerate(all_params):
        state = state_of([p], vocab_size, [([5, 6, 7], 2)])
        alone.append(sample_ids(logits[i : i + 1], state, [0], [position])[0])
    chosen = data.draw(st.permutations(range(len(kinds))))[: data.draw(st.integers(1, len(kinds)))]
    slots = data.draw(st.permutations(range(len(kinds))))
    state = SamplingState(len(kinds), vocab_size, CPU, (EOS,))
    for i in chosen:
        state.start(slots[i], all_params[i], [5, 6, 7], 2)
    rows = [slots[i] for i in chosen]
    assert sample_ids(logits[list(chosen)], state, rows, [position] * len(chosen)) == [alone[i] for i in chosen]


def test_seed_and_position_decide_the_token() -> None:
    logits = torch.zeros(1, 1000)
    one, two = state_of([params(seed=1)], 1000), state_of([params(seed=2)], 1000)
    first = [sample_ids(logits, one, [0], [position])[0] for position in range(50)]
    assert first == [sample_ids(logits, one, [0], [position])[0] for position in range(50)]
    other = [sample_ids(logits, two, [0], [position])[0] for position in range(50)]
    assert len(set(first)) > 40
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 5


# ---- edges -------------------------------------------------------------------------------------------------------

EDGES = [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.5}, {"top_k": 10**6}, {"min_p": 1.0}]


@pytest.mark.parametrize("fields", [*EDGES, {"top_k": 2, "top_p": 1.0}, {"temperature": 1e-4}], ids=str)
@pytest.mark.parametrize(
    "row",
    [
        [0.0],
        [-math.inf],
        [1.0, 2.0],
        [0.0] * 5,
        [1e4, -1e4, 1e4 - 1],
        [-math.inf, 3.0, -math.inf, 2.0],
        [-1e30, 3e38, -3e38],
        [-math.inf] * 3,
        [math.nan, 1.0, 2.0],
        [math.inf, 1.0, 2.0],
    ],
    ids=str,
)
def test_edges_give_a_possible_token(row: list[float], fields: dict[str, Any]) -> None:
    state = state_of([params(**fields)], len(row))
    for position in range(20):
        (token,) = sample_ids(torch.tensor([row]), state, [0], [position])
        assert 0 <= token < len(row)
        if any(math.isfinite(x) for x in row) and all(x < math.inf for x in row):
            assert row[token] > -math.inf
            if (
                fields.get("temperature") == 0.0
                or ("top_k" in fields and fields["top_k"] == 1)
                or fields.get("top_p") == 0
            ):
                assert token == row.index(max(row))


def test_everything_masked_falls_back_to_the_most_likely() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    every = {"bad_words_token_ids": [0, 1, 2]}
    state = state_of([params(**every), params(**every, temperature=0.0), params(**every, top_p=0.5)], 3)
    assert sample_ids(logits, state, [0, 1, 2], [0, 0, 0]) == [1, 1, 1]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 4)
    kinds = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}]
    state = state_of([params(**kind) for kind in kinds], 4)
    assert state.batch([0, 1, 2, 3], [0] * 4).layout.random is None
    assert sample_ids(logits, state, [0, 1, 2, 3], [0] * 4) == [1] * 4


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    state = state_of([params(top_k=2)], 6)
    taken = {sample_ids(torch.zeros(1, 6), state, [0], [position])[0] for position in range(50)}
    assert taken == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_float_types_and_no_rows(dtype: torch.dtype) -> None:
    state = state_of([params(), params(temperature=0.0), params(top_p=0.5, repetition_penalty=1.5)], 50)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampled = Sampler().sample(logits, state.batch([0, 1, 2], [0, 0, 0]))
    assert sampled.token_ids_s.dtype == torch.int64 and sampled.token_ids_s[1] == logits[1].argmax()
    assert Sampler().sample(logits[:0], state.batch([], [])).token_ids_s.shape == (0,)


# ---- what is kept between steps ----------------------------------------------------------------------------------


def test_the_layout_is_kept_while_the_same_slots_sample() -> None:
    state = state_of([params(), params(top_p=0.5, min_tokens=2)], 8)
    early = state.batch([0, 1], [0, 1]).layout
    late = state.batch([0, 1], [1, 2]).layout
    assert late is not early and early.bans is not None and late.bans is None
    assert state.batch([0, 1], [2, 3]).layout is late
    assert state.batch([1, 0], [3, 4]).layout is not late
    again = state.batch([0, 1], [4, 5]).layout
    state.start(1, params(), [1], 1)
    assert state.batch([0, 1], [5, 6]).layout is not again


def test_an_unset_number_is_refused() -> None:
    with pytest.raises(ParamValueError, match="seed must be set"):
        SamplingState(1, 4, CPU, ()).start(0, params(seed=None), [1], 1)


def test_truncation_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "min_p": 0.3}, {"top_p": 0.99}, {"top_p": 0.2}]
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(5))
    state = state_of([params(**kind) for kind in kinds], 2000)
    whole = [sample_ids(logits, state, [0, 1, 2, 3, 4, 5], [position] * 6) for position in range(10)]
    monkeypatch.setattr(sampler_module, "_CHUNK_ELEMENTS", 4000)
    assert whole == [sample_ids(logits, state, [0, 1, 2, 3, 4, 5], [position] * 6) for position in range(10)]


def test_final_logits_hold_exactly_the_tokens_that_can_be_drawn() -> None:
    generator = torch.Generator().manual_seed(5)
    kinds = [{}, {"min_p": 0.1}, {"top_k": 5}, {"top_p": 0.6, "temperature": 2.0}, {"top_k": 9, "min_p": 0.3}]
    all_params = [params(**kind) for kind in kinds]
    logits = torch.randn(len(kinds), 30, generator=generator) * 2
    batch = state_of(all_params, 30).batch(list(range(len(kinds))), [0] * len(kinds))
    assert batch.layout.random is not None and batch.uniforms_r is not None
    _, final = draw_rows(logits, batch.layout.random, batch.uniforms_r, True)
    assert final is not None
    for row, p in enumerate(all_params):
        expected = reference_probabilities(logits[row].double(), p)
        torch.testing.assert_close(
            torch.softmax(final[row].double(), -1), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9
        )
