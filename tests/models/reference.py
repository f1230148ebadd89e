"""What transformers computes, in the form in which tests compare it with the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from engine_harness import Answer
from torch import Tensor


def random_prompts(lengths: Sequence[int], seed: int = 0, vocab_size: int = 128) -> list[list[int]]:
    """One prompt of random token ids for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def reference_logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """float32 logits [n, V] of every position of each sequence, in one batch.

    Sequences are padded at their end, which no earlier position can see.
    """
    longest = max(map(len, sequences))
    ids_sn = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    logits_snV = model(ids_sn, use_cache=False).logits
    return [row_nV[: len(sequence)] for row_nV, sequence in zip(logits_snV, sequences, strict=True)]


def reference_greedy(model: Any, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
    """`n_tokens` of transformers' own greedy `generate` for prompts of one length, which no token ends."""
    ids_sn = torch.tensor(prompts)
    output_sn = model.generate(
        ids_sn, attention_mask=torch.ones_like(ids_sn), max_new_tokens=n_tokens, do_sample=False, eos_token_id=None
    )
    new_ids: list[list[int]] = output_sn[:, ids_sn.shape[1] :].tolist()
    return new_ids


def fed_ids(answer: Answer) -> list[int]:
    """The tokens whose logits the engine computed: prompt and output, but for the last token."""
    return (answer.prompt_ids + answer.token_ids)[:-1]


def worst_difference(model: Any, *runs: Sequence[Answer]) -> float:
    """The largest difference from the reference among all logits of all positions that the engine computed.

    Every run has the same prompts and must have led to the same tokens. Infinite when the engine computed a NaN; a
    position that the prefix cache spared is NaN as a whole.
    """
    sequences = [fed_ids(answer) for answer in runs[0]]
    worst = 0.0
    expected = reference_logits(model, sequences)
    for run in runs:
        assert [fed_ids(answer) for answer in run] == sequences
        for answer, expected_pV in zip(run, expected, strict=True):
            assert answer.logits_pV is not None
            computed_pV = answer.logits_pV[: len(expected_pV)]
            spared_p = computed_pV.isnan().all(-1)
            assert int(spared_p.sum()) <= answer.n_cached_tokens
            difference_pV = (computed_pV - expected_pV)[~spared_p].abs()
            worst = max(worst, difference_pV.nan_to_num(torch.inf).max().item())
    return worst
