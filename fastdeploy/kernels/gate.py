"""The router of a sparse layer in one kernel: float32 logits on bf16 tensor cores, softmax, top k and weights.

A float32 gate weight is kept as three bf16 matrices whose sum is it exactly (3 x 8 significant bits). Activations are
bf16 already, so three bf16 products accumulated in float32 give float32 logits: the choice of experts does not suffer
from TF32, and no slow float32 matmul is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps

N_ARRIVED = 64  # counters that `choose_experts` needs
_MAX_SLICED_TOKENS = 1024
_N_PROGRAMS = 132


def split_gate_weight(weight_eH: Tensor, activation_dtype: torch.dtype) -> Tensor:
    """The gate weight as `choose_experts` wants it: [parts, e, H] in the dtype of the activations.

    float32 weights for bf16 activations become three parts with an exact sum; otherwise there is one part.
    """
    if weight_eH.dtype == activation_dtype:
        return weight_eH[None]
    parts, rest_eH = [], weight_eH.float()
    for _ in range(3):
        parts.append(rest_eH.to(activation_dtype))
        rest_eH = rest_eH - parts[-1].float()
    return torch.stack(parts)


def choose_experts_ref(
    x_tH: Tensor, weight_neH: Tensor, bias_e: Tensor | None, k: int, norm_min: float | None
) -> tuple[Tensor, Tensor]:
    """What `choose_experts` computes."""
    weight_eH = weight_neH.float().sum(0)
    logit_te = x_tH.float() @ weight_eH.T
    if weight_neH.shape[0] == 1:
        logit_te = logit_te.to(x_tH.dtype)
    return choose_from_logits_ref(logit_te, bias_e, k, norm_min)


def choose_from_logits_ref(
    logit_te: Tensor, bias_e: Tensor | None, k: int, norm_min: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, top k of probability plus bias, weights without the bias; ties go to the lowest id."""
    score_te = logit_te.softmax(-1, dtype=torch.float32)
    choice_te = score_te if bias_e is None else score_te + bias_e
    expert_tk = choice_te.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weight_tk = score_te.gather(-1, expert_tk)
    if norm_min is not None:
        weight_tk = weight_tk / weight_tk.sum(-1, keepdim=True).clamp_min(norm_min)
    return expert_tk, weight_tk


def choose_experts(
    x_tH: Tensor, weight_neH: Tensor, bias_e: Tensor | None, k: int, norm_min: float | None, arrived_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Expert ids int64 [t, k] and their float32 weights [t, k], best first.

    `weight_neH` comes from `split_gate_weight`; one part means logits in the activations' dtype, as a model whose gate
    is not float32 computes them. `bias_e` float32 [e] steers the choice only. `norm_min`: renormalise the weights to a
    sum of 1, the divisor at least this; None leaves them. `arrived_b` int32 [N_ARRIVED] zeros, kept by the caller for
    calls on one stream; it is zero again afterwards.
    """
    (n_tokens, hidden_size), n_experts = x_tH.shape, weight_neH.shape[1]
    expert_tk = torch.empty(n_tokens, k, dtype=torch.int64, device=x_tH.device)
    weight_tk = torch.empty(n_tokens, k, dtype=torch.float32, device=x_tH.device)
    if not n_tokens:
        return expert_tk, weight_tk
    tile = _tile(n_tokens, hidden_size)
    n_slices = triton.cdiv(hidden_size, tile.slice_h)
    part_nte = torch.empty(n_slices if n_slices > 1 else 0, n_tokens, n_experts, device=x_tH.device)
    pdl = overlaps(x_tH.device)
    lossy = weight_neH.shape[0] == 1 and x_tH.dtype != torch.float32
    _route_kernel[(triton.cdiv(n_tokens, tile.block_t), n_slices)](
        x_tH, weight_neH, weight_neH if bias_e is None else bias_e, part_nte, arrived_b, expert_tk, weight_tk, n_tokens,
        norm_min or 0.0, hidden_size, n_experts, k, triton.next_power_of_2(k), weight_neH.shape[0], tile.slice_h,
        n_slices, bias_e is not None, norm_min is not None, lossy, tile.block_t,
        max(16, triton.next_power_of_2(n_experts)), tile.block_k, pdl, num_warps=tile.warps, num_stages=3,
        launch_pdl=pdl,
    )  # fmt: skip
    return expert_tk, weight_tk


@dataclass(frozen=True, slots=True)
class _Tile:
    block_t: int
    block_k: int
    slice_h: int
    warps: int


def _tile(n_tokens: int, hidden_size: int) -> _Tile:
    """Few tokens are spread over slices of H, so that the whole chip reads the weight; many need no slices."""
    if n_tokens > _MAX_SLICED_TOKENS:
        return _Tile(64, 64, hidden_size, 4)
    n_slices = max(1, min(triton.cdiv(hidden_size, 128), _N_PROGRAMS // triton.cdiv(n_tokens, 16)))
    return _Tile(16, 128, triton.cdiv(triton.cdiv(hidden_size, n_slices), 128) * 128, 8)


@triton.jit(do_not_specialize=["n_tokens"])
def _route_kernel(
    x_ptr, w_ptr, bias_ptr, part_ptr, arrived_ptr, expert_ptr, weight_ptr, n_tokens, norm_min, H: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, BKEPT: tl.constexpr, N_PARTS: tl.constexpr, SLICE: tl.constexpr,
    N_SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALISE: tl.constexpr, LOSSY: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * SLICE
    expert, column = tl.arange(0, BE), tl.arange(0, BK)
    inside = (token < n_tokens)[:, None] & (expert < E)
    logit = tl.zeros((BT, BE), tl.float32)
    await_previous(PDL)
    for k in range(0, SLICE, BK):
        h = first + k + column
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * H + h, mask=(token < n_tokens)[:, None] & (h < H), other=0.0)
        for part in tl.static_range(N_PARTS):
            place = part * E * H + expert[:, None] * H + h
            w = tl.load(w_ptr + place, mask=(expert < E)[:, None] & (h < H), other=0.0)
            logit = tl.dot(x, tl.trans(w), logit, input_precision="ieee")
    if N_SLICES > 1:
        mine = (token.to(tl.int64)[:, None] * E) + expert
        slice_size = n_tokens.to(tl.int64) * E
        tl.store(part_ptr + tl.program_id(1) * slice_size + mine, logit, mask=inside)
        tl.debug_barrier()  # all threads' stores come before the one arrival
        if tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") < N_SLICES - 1:
            return
        # The last program to arrive adds the slices in their order, so the sum does not depend on who was last.
        tl.store(arrived_ptr + tl.program_id(0), 0)
        logit = tl.zeros((BT, BE), tl.float32)
        for i in tl.static_range(N_SLICES):
            logit += tl.load(part_ptr + i * slice_size + mine, mask=inside, other=0.0, cache_modifier=".cg")
    if LOSSY:
        logit = logit.to(x_ptr.dtype.element_ty).to(tl.float32)
    logit = tl.where(expert < E, logit, -float("inf"))
    score = tl.exp(logit - tl.max(logit, 1)[:, None])
    score = score / tl.sum(score, 1)[:, None]
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
    choice = tl.where(expert < E, choice, -float("inf"))
    slot = tl.arange(0, BKEPT)
    ids = tl.zeros((BT, BKEPT), tl.int32)
    weights = tl.zeros((BT, BKEPT), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(choice, 1)[:, None]
        # NaN equals nothing: such a row gets the last expert instead of an id outside the table.
        best_id = tl.minimum(tl.min(tl.where(choice == best, expert, BE), 1), E - 1)[:, None]
        weight = tl.sum(tl.where(expert == best_id, score, 0.0), 1)[:, None]
        ids = tl.where(slot == j, best_id, ids)
        weights = tl.where(slot == j, weight, weights)
        choice = tl.where(expert == best_id, -float("inf"), choice)
    if NORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, 1), norm_min)[:, None]
    place = token.to(tl.int64)[:, None] * K + slot
    kept = (token < n_tokens)[:, None] & (slot < K)
    tl.store(expert_ptr + place, ids, mask=kept)
    tl.store(weight_ptr + place, weights, mask=kept)
