"""Activations as 8-bit floats (e4m3fn) with a scale for every 128 columns, made on every step by a kernel.

Weights are quantised once, see `weight_formats.py`. A scale is what a code is multiplied with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.kernels.weight_formats import FP8_BLOCK

_FP8_MAX = 448.0
_MIN_SCALE = 1e-12  # an all-zero block would divide by zero


class RowsFp8(NamedTuple):
    """Activations in FP8: codes [t, I], and the float32 scale of each 1 x 128 block [I / 128, t]."""

    codes_tI: Tensor
    scale_bt: Tensor


def quantize_rows_ref(x_tI: Tensor) -> RowsFp8:
    """What `quantize_rows` computes."""
    values = x_tI.float().unflatten(-1, (-1, FP8_BLOCK))
    scale = (values.abs().amax(-1) / _FP8_MAX).clamp_min(_MIN_SCALE)
    return RowsFp8((values / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale.T.contiguous())


def quantize_rows(x_tI: Tensor, offset_g: Tensor | None = None) -> RowsFp8:
    """Activations in FP8; I must be a multiple of 128.

    With `offset_g` (of `moe_rows.sort_pairs`) rows behind offset_g[-1] are not written.
    """
    n_rows, width = x_tI.shape
    assert width % FP8_BLOCK == 0 and x_tI.is_contiguous()
    codes_tI = torch.empty(n_rows, width, dtype=torch.float8_e4m3fn, device=x_tI.device)
    scale_bt = torch.empty(width // FP8_BLOCK, n_rows, dtype=torch.float32, device=x_tI.device)
    if n_rows:
        pdl = overlaps(x_tI.device)
        _quantize_rows_kernel[(n_rows,)](
            x_tI, offset_g, codes_tI, scale_bt, 0 if offset_g is None else offset_g.numel() - 1, n_rows, width,
            offset_g is not None, triton.next_power_of_2(width // FP8_BLOCK), FP8_BLOCK, pdl, num_warps=4,
            launch_pdl=pdl,
        )  # fmt: skip
    return RowsFp8(codes_tI, scale_bt)


@triton.jit
def to_fp8(x, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of x [COUNT, BLOCK] and the scale of each of its rows."""
    scale = tl.maximum(tl.max(tl.abs(x), 1) / 448.0, 1e-12)
    return (x / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_rows_kernel(
    x_ptr, offset_ptr, code_ptr, scale_ptr, n_groups, n_rows, WIDTH: tl.constexpr, BOUNDED: tl.constexpr,
    N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    if BOUNDED:  # noqa: SIM102 one condition would read where no offsets are
        if row >= tl.load(offset_ptr + n_groups):
            return
    block = tl.arange(0, N_BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    code, scale = to_fp8(x, N_BLOCKS, BLOCK)
    tl.store(code_ptr + row * WIDTH + column, code, mask=column < WIDTH)
    tl.store(scale_ptr + block.to(tl.int64) * n_rows + row, scale, mask=block < WIDTH // BLOCK)
