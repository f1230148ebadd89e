"""Slow sampling of one row at a time in float64, and short ways to set up the real sampler for tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdeploy.runner.sampler import Sampler
from fastdeploy.runner.sampling_state import SamplingState
from fastdeploy.sampling_params import SamplingParams

CPU = torch.device("cpu")
EOS = 0
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": 7,
    "min_tokens": 0,
}


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{**DEFAULTS, **fields})


def state_of(
    all_params: list[SamplingParams], vocab_size: int, tokens: list[tuple[list[int], int]] | None = None
) -> SamplingState:
    """One slot per request; `tokens` holds (token ids, number of prompt tokens)."""
    state = SamplingState(len(all_params), vocab_size, CPU, (EOS,))
    for slot, one in enumerate(all_params):
        ids, n_prompt = tokens[slot] if tokens else ([0], 1)
        state.start(slot, one, ids, n_prompt)
    return state


def sample_ids(logits_sV: Tensor, state: SamplingState, slots: list[int], positions: list[int]) -> list[int]:
    return Sampler().sample(logits_sV, state.batch(slots, positions)).token_ids_s.tolist()


def reference_logits(logits_V: Tensor, p: SamplingParams, ids: list[int], n_prompt: int, position: int) -> Tensor:
    """float64 logits after bias, bans and penalties, one token at a time."""
    x = logits_V.double().tolist()
    for token, value in p.logit_bias.items():
        x[token] += value
    banned = set(p.bad_words_token_ids or ())
    if position < p.min_tokens:
        banned |= {*(p.stop_token_ids or ()), *(() if p.ignore_eos else (EOS,))}
    for token in banned:
        x[token] = -math.inf
    output = ids[n_prompt:]
    for token in range(len(x)):
        if token in ids:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty * (token in output)
    return torch.tensor(x, dtype=torch.float64)


def reference_probabilities(x_V: Tensor, p: SamplingParams) -> list[float]:
    """What each token should be drawn with, from float64 logits."""
    if p.temperature < 1e-5 or p.top_k == 1 or p.top_p == 0:
        return [float(token == int(x_V.argmax())) for token in range(len(x_V))]
    probs = torch.softmax(x_V / p.temperature, -1).tolist()
    order = sorted(range(len(probs)), key=lambda token: (-float(x_V[token]), token))
    if p.top_k > 0:
        order = order[: p.top_k]
    mass, before, kept = sum(probs[t] for t in order), 0.0, []
    for token in order:
        if p.top_p < 1 and before >= p.top_p * mass and kept:
            break
        kept.append(token)
        before += probs[token]
    kept = [t for t in kept if probs[t] >= p.min_p * probs[kept[0]]]
    mass = sum(probs[t] for t in kept)
    return [probs[t] / mass if t in kept else 0.0 for t in range(len(probs))]
