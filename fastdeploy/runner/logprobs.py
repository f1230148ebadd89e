"""Log-probabilities (or logits) of tokens taken and of the most likely ones, as `wire.messages.TokenLogprobs`.

Values are float64 differences of a float32 logit and a float64 log-sum-exp: nothing of size s x V is normalised, and
the error is that of float32 `exp` averaged over the row, about 1e-7. Equal logits rank by token id, lowest first, but
share the `rank` number (1 + how many are strictly larger). A token without probability has the value -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeploy.config.schema import LogprobsMode
from fastdeploy.runner.ranking import best_keys, first_depth, kept_tokens, key_token_ids, order_keys
from fastdeploy.runner.sampling_state import LogprobRows, TopGroup
from fastdeploy.wire.messages import TokenLogprobs

_CHUNK_BYTES = 64 << 20  # float32 logits of prompt positions handled at a time
_HEAD = 3  # token id, value, rank


class PendingLogprobs:
    """Log-probabilities on their way to the host, in one transfer that starts at once."""

    def __init__(self, packed: Tensor, rows: Sequence[int], n_rows: int, groups: Sequence[TopGroup]) -> None:
        self._packed = packed.to("cpu", non_blocking=True)
        self._arrived = None
        if packed.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._rows, self._n_rows, self._groups = rows, n_rows, groups

    def read(self) -> list[TokenLogprobs | None]:
        """One entry per row of the batch, None where none were asked for. Waits for the transfer."""
        if self._arrived is not None:
            self._arrived.synchronize()
        n_head = _HEAD * len(self._rows)
        tops: dict[int, tuple[list[int], list[float]]] = {}
        offset = n_head
        for group in self._groups:
            for member in group.members:
                ids, values = self._packed[offset : offset + 2 * group.n_top].view(2, -1).tolist()
                tops[member] = ([int(i) for i in ids], values)
                offset += 2 * group.n_top
        found: list[TokenLogprobs | None] = [None] * self._n_rows
        head = self._packed[:n_head].view(-1, _HEAD).tolist()
        for member, (row, (token_id, value, rank)) in enumerate(zip(self._rows, head, strict=True)):
            found[row] = TokenLogprobs(int(token_id), value, int(rank), *tops.get(member, ([], [])))
        return found


def raw_scores(logits_sV: Tensor, rows: LogprobRows, mode: LogprobsMode) -> Tensor:
    """float32 [l, V]: the model's logits of the rows asked for; for raw_logprobs as each request wants them.

    `temp_scaled_logprobs` divides by the temperature (a greedy request's counts as 1), then
    `top_p_normalized_logprobs` sets tokens outside the nucleus of the result to -inf.
    """
    x_lV = (logits_sV if rows.rows_l is None else logits_sV[rows.rows_l]).float()
    if mode != "raw_logprobs":
        return x_lV
    if rows.temperature_l1 is not None:
        x_lV = x_lV / rows.temperature_l1
    if rows.nucleus is not None:
        index_n = rows.nucleus.index_n
        x_lV = x_lV.index_copy(0, index_n, _nucleus_only(x_lV[index_n], rows.nucleus.top_p_n))
    return x_lV


def token_logprobs(
    scores_lV: Tensor, token_ids_l: Tensor, rows: LogprobRows, n_rows: int, mode: LogprobsMode
) -> PendingLogprobs:
    """What to report of `scores_lV` (float32), the scores of the rows asked for, when `token_ids_l` were taken."""
    packed = _pack(scores_lV, token_ids_l, rows.groups, mode)
    return PendingLogprobs(packed, rows.rows, n_rows, rows.groups)


def prompt_logprobs(
    logits_tV: Tensor, next_token_ids_t: Tensor, n_top: int, mode: LogprobsMode = "raw_logprobs"
) -> list[TokenLogprobs]:
    """One entry per prompt position: the token that follows there, and the `n_top` most likely (-1: all).

    A prompt is not sampled, so the processed modes report the same as the raw ones. Memory: float32 logits of at most
    64 MiB at a time, and about four times that for ranking them. Waits for the device once per such chunk.
    """
    n_tokens, vocab_size = logits_tV.shape
    n_top = vocab_size if n_top < 0 else min(n_top, vocab_size)
    chunk = max(1, _CHUNK_BYTES // (4 * vocab_size))
    found: list[TokenLogprobs] = []
    for begin in range(0, n_tokens, chunk):
        scores_tV = logits_tV[begin : begin + chunk].float()
        members = tuple(range(len(scores_tV)))
        groups = (TopGroup(n_top, members, None),) if n_top else ()
        packed = _pack(scores_tV, next_token_ids_t[begin : begin + chunk], groups, mode)
        entries = PendingLogprobs(packed, members, len(members), groups).read()
        found.extend(entry for entry in entries if entry is not None)
    return found


def _pack(scores_lV: Tensor, token_ids_l: Tensor, groups: Sequence[TopGroup], mode: LogprobsMode) -> Tensor:
    """All numbers as one float64 vector (ids and ranks are exact in it): the heads, then ids and values per group."""
    ids_l1 = token_ids_l[:, None].long()
    taken_l1 = scores_lV.gather(1, ids_l1)
    ranks_l1 = (scores_lV > taken_l1).sum(-1, keepdim=True) + 1
    shift_l1 = torch.zeros_like(taken_l1, dtype=torch.float64) if mode.endswith("logits") else _log_sum_exp(scores_lV)
    parts = [torch.cat([ids_l1.double(), taken_l1.double() - shift_l1, ranks_l1.double()], 1).flatten()]
    for group in groups:
        rows_gV = scores_lV if group.index_g is None else scores_lV[group.index_g]
        shift_g1 = shift_l1 if group.index_g is None else shift_l1[group.index_g]
        top_ids_gn = key_token_ids(best_keys(order_keys(rows_gV), group.n_top))
        values_gn = rows_gV.gather(1, top_ids_gn).double() - shift_g1
        parts.append(torch.stack([top_ids_gn.double(), values_gn], 1).flatten())
    return torch.cat(parts)


def _log_sum_exp(x_lV: Tensor) -> Tensor:
    """float64 [l, 1]; 0 for a row without any finite logit, whose log-probabilities then stay -inf and never NaN."""
    top_l1 = x_lV.amax(-1, keepdim=True)
    top_l1 = torch.where(top_l1 == -math.inf, 0.0, top_l1)
    mass_l1 = (x_lV - top_l1).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    return torch.where(mass_l1 == 0, 0.0, top_l1.double() + mass_l1.log())


def _nucleus_only(x_nV: Tensor, top_p_n: Tensor) -> Tensor:
    vocab_size = x_nV.shape[1]
    top_k_n = torch.full_like(top_p_n, vocab_size, dtype=torch.int64)
    depth = first_depth(0, vocab_size, x_nV.device)
    kept_nV = kept_tokens(x_nV, torch.softmax(x_nV, -1), top_k_n, top_p_n, depth, decided=False)
    return torch.where(kept_nV, x_nV, -math.inf)
