"""From logits to tokens: bias, bans, penalties, temperature, top-k, top-p, min-p, draw.

How a token is drawn: inverse of the cumulative distribution, in vocabulary order, at one uniform number per (seed,
output position), see `sampling_state.counter_uniforms`. The outcome depends on the row's own logits and parameters, not
on the batch, on chunking, preemption or steps ahead. The logits themselves do differ in their last digits with the
number of rows computed together. That moves a draw where a border between two tokens is so near: seldom with top-k, but
in a flat distribution over a whole vocabulary, which has thousands of borders, a long seeded answer may take another
way in another batch. Each token has its float32 softmax weight (about 1e-6 relative);
weights are added up in float64, first per block of 1024 and then inside the block drawn, so which token is found is off
by at most 1e-15 of the total mass, and a token of weight 0 is never found.

The greedy path is one `argmax` (of equal logits the lowest id). Nothing here waits for the device, except when some row
has top-p without top-k (see `ranking`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.config.schema import LogprobsMode
from fastdeploy.runner.logprobs import PendingLogprobs, raw_scores, token_logprobs
from fastdeploy.runner.ranking import kept_tokens
from fastdeploy.runner.sampling_state import Layout, PenaltyRows, RandomRows, SamplingBatch

_BLOCK = 1024
_CHUNK_ELEMENTS = 1 << 24  # logits to truncate at a time: bounds the memory of `kept_tokens` at about 640 MiB


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step sampled."""

    token_ids_s: Tensor  # int64, on the device of the logits
    logprobs: PendingLogprobs | None  # None when no row asked


class Sampler:
    """Samples one token per row; `mode` says which numbers are reported as log-probabilities.

    Processed modes report logits after all stages. A greedy row's end after the penalties: temperature and truncation
    do not change what it takes.
    """

    def __init__(self, mode: LogprobsMode = "raw_logprobs") -> None:
        self._mode = mode
        self._processed = mode.startswith("processed")

    def sample(self, logits_sV: Tensor, batch: SamplingBatch) -> Sampled:
        """Take a token for each row of `logits_sV` (any float type, unchanged), rows as in `batch`.

        A row that bias and bans leave without a finite logit falls back to its most likely token before them.
        Counts the tokens in the penalty history, so call it once per step.
        """
        layout = batch.layout
        edited_sV = edit_logits(logits_sV, layout)
        if layout.random is None or batch.uniforms_r is None:
            token_ids_s, final_sV = edited_sV.argmax(-1), edited_sV
        else:
            token_ids_s, final_sV = self._sample_mixed(edited_sV, layout, layout.random, batch.uniforms_r)
        if layout.bias is not None or layout.bans is not None:
            usable_s = edited_sV.amax(-1).isfinite()
            token_ids_s = torch.where(usable_s, token_ids_s, logits_sV.argmax(-1))
        if layout.penalties is not None:
            penalised_p = token_ids_s[layout.penalties.rows_p]
            layout.penalties.history.add(layout.penalties.history_rows_p, penalised_p)
        return Sampled(token_ids_s, self._report(logits_sV, final_sV, token_ids_s, layout))

    def _sample_mixed(
        self, edited_sV: Tensor, layout: Layout, random: RandomRows, uniforms_r: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token ids [s], and the logits after all stages where the mode needs them."""
        x_rV = (edited_sV if random.rows_r is None else edited_sV[random.rows_r]).float()
        want_final = self._processed and layout.logprobs is not None
        token_ids_r, final_rV = draw_rows(x_rV, random, uniforms_r, want_final)
        if random.rows_r is None:
            return token_ids_r, edited_sV if final_rV is None else final_rV
        token_ids_s = torch.empty_like(token_ids_r) if layout.all_random else edited_sV.argmax(-1)
        token_ids_s = token_ids_s.index_copy(0, random.rows_r, token_ids_r)
        if final_rV is None:
            return token_ids_s, edited_sV
        return token_ids_s, edited_sV.float().index_copy(0, random.rows_r, final_rV)

    def _report(
        self, logits_sV: Tensor, final_sV: Tensor, token_ids_s: Tensor, layout: Layout
    ) -> PendingLogprobs | None:
        rows = layout.logprobs
        if rows is None:
            return None
        ids_l = token_ids_s if rows.rows_l is None else token_ids_s[rows.rows_l]
        if self._processed:
            scores_lV = (final_sV if rows.rows_l is None else final_sV[rows.rows_l]).float()
        else:
            scores_lV = raw_scores(logits_sV, rows, self._mode)
        return token_logprobs(scores_lV, ids_l, rows, layout.n_rows, self._mode)


def edit_logits(logits_sV: Tensor, layout: Layout) -> Tensor:
    """Bias, bans and penalties: a float32 copy, or the logits themselves when no row needs any."""
    if layout.bias is None and layout.bans is None and layout.penalties is None:
        return logits_sV
    x_sV = logits_sV.to(torch.float32, copy=True)
    if (bias := layout.bias) is not None:
        x_sV.index_put_((bias.rows_i, bias.token_ids_i), bias.values_i, accumulate=True)
    if (bans := layout.bans) is not None:
        x_sV.index_put_((bans.rows_i, bans.token_ids_i), bans.values_i)
    if layout.penalties is not None:
        _penalise(x_sV, layout.penalties)
    return x_sV


def _penalise(x_sV: Tensor, rows: PenaltyRows) -> None:
    """Repetition over prompt and output (divide what is positive, multiply the rest), then frequency and presence."""
    n_output_pV = rows.history.n_output_hV[rows.history_rows_p]
    in_output_pV = n_output_pV > 0
    seen_pV = rows.history.in_prompt_hV[rows.history_rows_p].logical_or_(in_output_pV)
    x_pV = x_sV[rows.rows_p]
    repeated_pV = torch.where(x_pV > 0, x_pV / rows.repetition_p1, x_pV * rows.repetition_p1)
    x_pV = torch.where(seen_pV, repeated_pV, x_pV)
    x_pV -= rows.frequency_p1 * n_output_pV
    x_pV -= rows.presence_p1 * in_output_pV
    x_sV.index_copy_(0, rows.rows_p, x_pV)


def draw_rows(x_rV: Tensor, rows: RandomRows, uniforms_r: Tensor, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """Temperature, truncation and draw of float32 rows: token ids [r], and if wanted the final logits [r, V].

    A row without a finite maximum gets some valid id.
    """
    # The maximum goes first, so that no temperature overflows the rest.
    scaled_rV = (x_rV - x_rV.amax(-1, keepdim=True)).div_(rows.temperature_r1)
    weights_rV = torch.softmax(scaled_rV, -1)
    final_rV = x_rV / rows.temperature_r1 if want_final else None
    n_chunk = max(1, _CHUNK_ELEMENTS // x_rV.shape[1])
    for begin in range(rows.n_plain, len(x_rV), n_chunk):
        chunk, part = slice(begin, begin + n_chunk), slice(begin - rows.n_plain, begin - rows.n_plain + n_chunk)
        top_k_t, top_p_t = rows.top_k_t[part], rows.top_p_t[part]
        kept_tV = kept_tokens(x_rV[chunk], weights_rV[chunk], top_k_t, top_p_t, rows.n_first, rows.decided)
        weights_rV[chunk].mul_(kept_tV)
        if final_rV is not None:
            final_rV[chunk].masked_fill_(~kept_tV, -math.inf)
    if rows.min_p_r1 is not None:
        likely_rV = weights_rV >= rows.min_p_r1 * weights_rV.amax(-1, keepdim=True)
        weights_rV.mul_(likely_rV)
        if final_rV is not None:
            final_rV.masked_fill_(~likely_rV, -math.inf)
    return draw(weights_rV, uniforms_r), final_rV


def draw(weights_sN: Tensor, uniforms_s: Tensor) -> Tensor:
    """int64 [s]: in each row the first place where the sum of weights so far exceeds uniform x total.

    `weights_sN` float32 >= 0, not normalised; `uniforms_s` float64 in [0, 1). Never a place of weight 0; a row without
    any weight, or with NaN, gives 0.
    """
    n_rows, n_places = weights_sN.shape
    n_blocks = math.ceil(n_places / _BLOCK)
    size = _BLOCK if n_blocks > 1 else n_places
    padding = n_blocks * size - n_places
    padded_sN = functional.pad(weights_sN, (0, padding)) if padding else weights_sN
    blocks_sbn = padded_sN.view(n_rows, n_blocks, size)
    mass_sb = blocks_sbn.sum(-1, dtype=torch.float64)
    sums_sb = mass_sb.cumsum(-1)
    target_s1 = uniforms_s[:, None] * sums_sb[:, -1:]
    block_s1 = first_above(sums_sb, mass_sb, target_s1)
    rest_s1 = target_s1 - (sums_sb.gather(1, block_s1) - mass_sb.gather(1, block_s1))
    inner_sn = blocks_sbn.gather(1, block_s1[:, :, None].expand(-1, 1, size)).squeeze(1).double()
    place_s1 = first_above(inner_sn.cumsum(-1), inner_sn, rest_s1)
    return (block_s1 * size + place_s1).squeeze(1)


def first_above(sums_sn: Tensor, weights_sn: Tensor, target_s1: Tensor) -> Tensor:
    """int64 [s, 1]: the first place of positive weight whose sum exceeds the target, or the last of positive weight.

    The latter is for rounding, which can leave the target at the very end.
    """
    positive_sn = weights_sn > 0
    above_sn = positive_sn & (sums_sn > target_s1)
    last_s1 = (positive_sn * torch.arange(weights_sn.shape[1], device=weights_sn.device)).amax(-1, keepdim=True)
    return torch.where(above_sn.any(-1, keepdim=True), above_sn.byte().argmax(-1, keepdim=True), last_s1)
