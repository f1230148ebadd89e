"""The vocabulary in order of likelihood, and where top-k and top-p cut it.

The order is total: larger logit first, and of equal logits the lower token id. bfloat16 logits tie often; a total order
makes top-k keep exactly k tokens, and makes what is kept a property of the row alone, not of the algorithm or device.

A cut is found without a full sort where possible. First the best `n_first` candidates are ranked, by a selection in
O(V): they decide a row if its top-k fits into them or their mass reaches top-p. For a wider nucleus, the mass is added
up in buckets of logits, and only the bucket in which it reaches top-p is ranked. A row is sorted only if that bucket is
crowded, as when all logits are equal. Whether rows are left after a stage is a question to the device that the host
waits for, and it arises only when some row has a top-p without a top-k: sorting every row to avoid it costs far more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LOW_BITS = 0xFFFFFFFF
_WORST = -(1 << 63)
_BUCKETS = 8192
_BUCKETS_PER_LOGIT = 256.0
_BUCKET_TOKENS = 1024  # ranked within a bucket


def order_keys(x_sV: Tensor) -> Tensor:
    """int64 [s, V] keys of float32 [s, V]: larger is better and no two of a row are equal; -0.0 counts as 0.0."""
    bits_sV = x_sV.view(torch.int32)
    negative_sV = bits_sV >> 31  # -1 or 0
    ordered_sV = (negative_sV & 0x7FFFFFFF).bitwise_xor_(bits_sV).sub_(negative_sV)
    low_V = torch.arange(_LOW_BITS, _LOW_BITS - x_sV.shape[1], -1, device=x_sV.device)
    return ordered_sV.long().bitwise_left_shift_(32).bitwise_or_(low_V)


def key_token_ids(keys: Tensor) -> Tensor:
    """The token ids that `order_keys` put into the keys, int64 of the same shape."""
    return _LOW_BITS - (keys & _LOW_BITS)


def best_keys(keys_sV: Tensor, k: int) -> Tensor:
    """The k best keys of each row, best first, int64 [s, k]; k is at most V."""
    if k * 4 > keys_sV.shape[1]:
        return keys_sV.sort(dim=-1, descending=True).values[:, :k]
    return keys_sV.topk(k, dim=-1).values


def first_depth(top_k: int, vocab_size: int, device: torch.device) -> int:
    """How many candidates `kept_tokens` should rank first when the largest top-k of the batch is `top_k` (0: none).

    A selection of 128 costs a CPU a third of one of 1024. On a GPU both cost about the same, but going on costs
    a further synchronisation, so it starts where few rows go on.
    """
    depth = max(128 if device.type == "cpu" else 1024, top_k)
    return vocab_size if depth * 4 > vocab_size else depth


def kept_tokens(
    x_sV: Tensor, weights_sV: Tensor, top_k_s: Tensor, top_p_s: Tensor, n_first: int, decided: bool
) -> Tensor:
    """bool [s, V]: top-k, then top-p over the mass that top-k left: the shortest prefix that reaches it, never empty.

    `x_sV` float32 gives the order, `weights_sV` float32 >= 0 is proportional to the probability and grows with x.
    `top_k_s` int64 is V where off; any other must be at most `n_first`. `top_p_s` is float64, 1 where off; each row
    has at least one of them. `decided` promises that every row has a top-k, so that nothing needs to be asked of the
    device. Needs about 40 bytes an element while it works.
    """
    keys_sV = order_keys(x_sV)
    best_sk = best_keys(keys_sV, n_first)
    mass_sk = weights_sV.gather(1, key_token_ids(best_sk)).cumsum(-1, dtype=torch.float64)
    top_k_s1, top_p_s1 = top_k_s[:, None], top_p_s[:, None]
    limited_s1 = top_k_s1 <= n_first
    total_s1 = weights_sV.sum(-1, keepdim=True, dtype=torch.float64)
    left_s1 = torch.where(limited_s1, mass_sk.gather(1, top_k_s1.clamp(max=n_first) - 1), total_s1)
    # Without top-p even a token whose weight is 0 in float32 stays.
    goal_s1 = torch.where(top_p_s1 < 1, top_p_s1 * left_s1, torch.inf)
    last_s1 = _last_key(best_sk, mass_sk, goal_s1, top_k_s1)
    if not decided and n_first < x_sV.shape[1]:
        enough_s = (limited_s1 | (mass_sk[:, -1:] >= goal_s1)).squeeze(1)
        if not bool(enough_s.all()):
            rest_w = enough_s.logical_not().nonzero().squeeze(1)
            last_s1[rest_w] = _wide_last_key(x_sV[rest_w], keys_sV[rest_w], weights_sV[rest_w], goal_s1[rest_w])
    return keys_sV >= last_s1


def _last_key(keys_sk: Tensor, mass_sk: Tensor, goal_s1: Tensor, top_k_s1: Tensor | None = None) -> Tensor:
    """int64 [s, 1]: of keys that are best first, the last to keep; `mass_sk` is the mass up to and with each."""
    kept_sk = functional.pad(mass_sk, (1, -1)) < goal_s1
    n_kept_s1 = kept_sk.sum(-1, keepdim=True)
    if top_k_s1 is not None:
        n_kept_s1 = torch.minimum(n_kept_s1, top_k_s1)
    return keys_sk.gather(1, n_kept_s1.clamp(min=1) - 1)


def _wide_last_key(x_wV: Tensor, keys_wV: Tensor, weights_wV: Tensor, goal_w1: Tensor) -> Tensor:
    """int64 [w, 1]: the last key to keep of rows with top-p only, by buckets of logits below the row's largest."""
    below_wV = (x_wV.amax(-1, keepdim=True) - x_wV).mul_(_BUCKETS_PER_LOGIT)
    bucket_wV = below_wV.nan_to_num_(nan=0.0).clamp_(max=_BUCKETS - 1).long()
    mass_wb = torch.zeros((len(x_wV), _BUCKETS), dtype=torch.float64, device=x_wV.device)
    mass_wb.scatter_add_(1, bucket_wV, weights_wV.double())
    sums_wb = mass_wb.cumsum(-1)
    # The bucket in which the sum reaches the goal; rounding may leave the goal just above the last sum.
    cut_w1 = (sums_wb < goal_w1).sum(-1, keepdim=True).clamp(max=_BUCKETS - 1)
    goal_inside_w1 = goal_w1 - functional.pad(sums_wb, (1, -1)).gather(1, cut_w1)
    inside_wV = bucket_wV == cut_w1
    best_wk = best_keys(
        torch.where(inside_wV, keys_wV, (keys_wV & _LOW_BITS) + _WORST), min(_BUCKET_TOKENS, x_wV.shape[1])
    )
    n_inside_w1 = inside_wV.sum(-1, keepdim=True)
    weights_wk = (weights_wV * inside_wV).gather(1, key_token_ids(best_wk))
    mass_wk = weights_wk.cumsum(-1, dtype=torch.float64)
    last_w1 = _last_key(best_wk, mass_wk, goal_inside_w1, n_inside_w1)
    crowded_w = ((n_inside_w1 > best_wk.shape[1]) & (mass_wk[:, -1:] < goal_inside_w1)).squeeze(1)
    if bool(crowded_w.any()):
        rest = crowded_w.nonzero().squeeze(1)
        sorted_rV = keys_wV[rest].sort(dim=-1, descending=True).values
        mass_rV = weights_wV[rest].gather(1, key_token_ids(sorted_rV)).cumsum(-1, dtype=torch.float64)
        last_w1[rest] = _last_key(sorted_rV, mass_rV, goal_w1[rest])
    return last_w1
