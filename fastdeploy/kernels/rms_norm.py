"""RMSNorm on a GPU: plain, with the residual addition before it (and FP8 codes beside it), and over heads of a token.

Imported only where Triton is. The references define the results; the kernels compute in float32 and round once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.kernels.quantize import RowsFp8, quantize_rows_ref, to_fp8
from fastdeploy.kernels.weight_formats import FP8_BLOCK


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32, in the dtype of x."""
    wide = x.float()
    scale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm_ref(x_tH: Tensor, residual_tH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual); the sum is rounded to the dtype of x before it is normed."""
    sum_tH = x_tH + residual_tH
    return rms_norm_ref(sum_tH, weight_H, eps), sum_tH


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference, for x [t, H] or [t, h, D] with contiguous last axis; the result is contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, out, weight, eps)
    return out


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """The same in place, also for a slice of the heads of a larger tensor."""
    _launch_norm(x, x, weight, eps)


def add_rms_norm_fp8_ref(
    x_tH: Tensor, residual_tH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor, RowsFp8]:
    """`add_rms_norm_ref`, and what `quantize_rows` makes of the norm."""
    normed_tH, sum_tH = add_rms_norm_ref(x_tH, residual_tH, weight_H, eps)
    return normed_tH, sum_tH, quantize_rows_ref(normed_tH)


def add_rms_norm(x_tH: Tensor, residual_tH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference, for contiguous [t, H]."""
    return _launch_add_norm(x_tH, residual_tH, weight_H, eps, None)


def add_rms_norm_fp8(x_tH: Tensor, residual_tH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, RowsFp8]:
    """As the reference, for contiguous [t, H], H a multiple of 128."""
    n_rows, size = x_tH.shape
    assert size % FP8_BLOCK == 0, f"the hidden size is {size}, no multiple of {FP8_BLOCK}"
    codes_tH = torch.empty(n_rows, size, dtype=torch.float8_e4m3fn, device=x_tH.device)
    rows8 = RowsFp8(codes_tH, torch.empty(size // FP8_BLOCK, n_rows, dtype=torch.float32, device=x_tH.device))
    return *_launch_add_norm(x_tH, residual_tH, weight_H, eps, rows8), rows8


def _launch_add_norm(
    x_tH: Tensor, residual_tH: Tensor, weight_H: Tensor, eps: float, rows8: RowsFp8 | None
) -> tuple[Tensor, Tensor]:
    n_rows, size = x_tH.shape
    normed_tH, sum_tH = torch.empty_like(x_tH), torch.empty_like(x_tH)
    if n_rows:
        block, pdl = triton.next_power_of_2(size), overlaps(x_tH.device)
        codes, scales = (normed_tH, normed_tH) if rows8 is None else rows8
        _add_rms_norm_kernel[(n_rows,)](
            x_tH, residual_tH, normed_tH, sum_tH, weight_H, codes, scales, eps, n_rows, size, block,
            rows8 is not None, FP8_BLOCK, pdl, num_warps=_n_warps(block), launch_pdl=pdl,
        )  # fmt: skip
    return normed_tH, sum_tH


def _launch_norm(x: Tensor, out: Tensor, weight: Tensor, eps: float) -> None:
    size = x.shape[-1]
    n_inner = x.shape[1] if x.dim() == 3 else 1
    n_rows = x.shape[0] * n_inner
    if n_rows == 0:
        return
    inner_strides = (x.stride(1), out.stride(1)) if x.dim() == 3 else (0, 0)
    block, pdl = triton.next_power_of_2(size), overlaps(x.device)
    _rms_norm_kernel[(n_rows,)](
        x,
        out,
        weight,
        eps,
        x.stride(0),
        inner_strides[0],
        out.stride(0),
        inner_strides[1],
        N_INNER=n_inner,
        SIZE=size,
        BLOCK=block,
        PDL=pdl,
        num_warps=_n_warps(block),
        launch_pdl=pdl,
    )


def _n_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    out_ptr,
    weight_ptr,
    eps,
    x_outer,
    x_inner,
    out_outer,
    out_inner,
    N_INNER: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // N_INNER, row % N_INNER
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    x = tl.load(x_ptr + outer * x_outer + inner * x_inner + column, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    tl.store(out_ptr + outer * out_outer + inner * out_inner + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, normed_ptr, sum_ptr, weight_ptr, code_ptr, scale_ptr, eps, n_rows, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, FP8: tl.constexpr, FP8_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = row * SIZE + column
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    await_previous(PDL)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded first: what later layers add to is what this norm saw.
    rounded = (x + residual).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, rounded, mask=inside)
    total = rounded.to(tl.float32)
    y = total * tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps) * weight
    y = y.to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + at, y, mask=inside)
    if FP8:
        n_blocks: tl.constexpr = BLOCK // FP8_BLOCK
        code, scale = to_fp8(tl.reshape(y.to(tl.float32), (n_blocks, FP8_BLOCK)), n_blocks, FP8_BLOCK)
        block = tl.arange(0, n_blocks)
        place = block[:, None] * FP8_BLOCK + tl.arange(0, FP8_BLOCK)
        tl.store(code_ptr + row * SIZE + place, code, mask=place < SIZE)
        tl.store(scale_ptr + block.to(tl.int64) * n_rows + row, scale, mask=block < SIZE // FP8_BLOCK)
