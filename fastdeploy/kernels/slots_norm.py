"""What follows a sparse layer in one pass: adding up a token's experts, the residual addition, and the next norm.

Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.moe_rows import SlotOutputs, sum_slots_ref
from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.kernels.rms_norm import add_rms_norm_ref


def sum_add_rms_norm_ref(
    slots: SlotOutputs, residual_tH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(norm(sum + residual), sum + residual) of `slots.summed()`, rounded to its dtype after each addition."""
    assert slots.expert_rk is not None and slots.weight_rk is not None, "nothing to add up"
    sum_tH = sum_slots_ref(slots.y_pH, slots.expert_rk, slots.weight_rk, slots.n_local, slots.n_shared, slots.base_rH)
    return add_rms_norm_ref(sum_tH, residual_tH, weight_H, eps)


def sum_add_rms_norm(slots: SlotOutputs, residual_tH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference, for contiguous residual and base [t, H]; rows of experts that are not here are never read."""
    assert slots.expert_rk is not None and slots.weight_rk is not None, "nothing to add up"
    n_rows, size = residual_tH.shape
    normed_tH, sum_tH = torch.empty_like(residual_tH), torch.empty_like(residual_tH)
    if n_rows:
        block, pdl = triton.next_power_of_2(size), overlaps(residual_tH.device)
        _kernel[(n_rows,)](
            slots.y_pH, slots.expert_rk.contiguous(), slots.weight_rk.contiguous(), slots.base_rH, residual_tH,
            weight_H, normed_tH, sum_tH, eps, size, slots.n_local, slots.n_shared, slots.expert_rk.shape[1],
            slots.base_rH is not None, block, pdl, num_warps=min(max(block // 512, 1), 16), launch_pdl=pdl,
        )  # fmt: skip
    return normed_tH, sum_tH


@triton.jit
def _kernel(
    y_ptr, expert_ptr, slot_weight_ptr, base_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, eps,
    SIZE: tl.constexpr, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr, K: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    at = row * SIZE + column
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        total += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    slot_ptr = y_ptr + row * (K + N_SHARED) * SIZE + column
    for slot in tl.static_range(K):
        here = tl.load(expert_ptr + row * K + slot) < N_LOCAL
        share = tl.where(here, tl.load(slot_weight_ptr + row * K + slot).to(tl.float32), 0.0)
        total += tl.load(slot_ptr + slot * SIZE, mask=inside & here, other=0.0).to(tl.float32) * share
    for slot in tl.static_range(K, K + N_SHARED):
        total += tl.load(slot_ptr + slot * SIZE, mask=inside, other=0.0).to(tl.float32)
    # Rounded as if each addition were a kernel of its own: what later layers add to is what this norm saw.
    rounded = (total.to(y_ptr.dtype.element_ty).to(tl.float32) + residual).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, rounded, mask=inside)
    x = rounded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    tl.store(normed_ptr + at, y.to(normed_ptr.dtype.element_ty), mask=inside)
