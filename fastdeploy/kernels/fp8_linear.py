"""A linear layer with block-wise FP8 weights: few rows at memory speed, many rows on FP8 tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeploy.kernels.quantize import quantize_rows, quantize_rows_ref
from fastdeploy.kernels.weight_formats import FP8_BLOCK, dequantize_blocks

_MAX_FEW_ROWS = 32  # cuBLAS refuses a handful of rows and gains from here on
_ROW_STEP = 16  # cuBLAS wants whole 16-byte columns of scales


def fp8_linear_ref(x_tI: Tensor, codes_OI: Tensor, scale_ob: Tensor) -> Tensor:
    """What `fp8_linear` computes."""
    x8_tI, x_scale_bt = quantize_rows_ref(x_tI)
    rounded_tI = x8_tI.float() * x_scale_bt.T.repeat_interleave(FP8_BLOCK, -1)
    return functional.linear(rounded_tI, dequantize_blocks(codes_OI, scale_ob)).to(x_tI.dtype)


def fp8_linear(x_tI: Tensor, codes_OI: Tensor, scale_ob: Tensor) -> Tensor:
    """x @ w.T, [t, O] in the dtype of x; w in FP8 with scales [O / 128, I / 128], O and I multiples of 128.

    Activations are rounded to FP8 in blocks of 128 columns.
    """
    n_rows, n_out = x_tI.shape[0], codes_OI.shape[0]
    assert n_out % FP8_BLOCK == 0 and x_tI.shape[1] % FP8_BLOCK == 0, "block-wise FP8 needs sizes in 128s"
    if n_rows == 0:
        return x_tI.new_empty(0, n_out)
    # cuBLAS takes rows of scales in fours and reads wrong ones, without an error, when their number is no multiple.
    if n_rows <= _MAX_FEW_ROWS or scale_ob.shape[1] % 4 or not x_tI.is_cuda:
        return _few(x_tI.contiguous(), codes_OI, scale_ob)
    padded_tI = functional.pad(x_tI, (0, 0, 0, -n_rows % _ROW_STEP)) if n_rows % _ROW_STEP else x_tI.contiguous()
    x8_tI, x_scale_bt = quantize_rows(padded_tI)
    out_tO: Tensor = torch._scaled_mm(x8_tI, codes_OI.T, scale_a=x_scale_bt.T, scale_b=scale_ob.T, out_dtype=x_tI.dtype)
    return out_tO[:n_rows]


def _few(x_tI: Tensor, codes_OI: Tensor, scale_ob: Tensor) -> Tensor:
    (n_rows, width), n_out = x_tI.shape, codes_OI.shape[0]
    out_tO = x_tI.new_empty(n_rows, n_out)
    x8_tI, x_scale_bt = quantize_rows(x_tI)
    block_m, block_n = (16 if n_rows <= 16 else 32), (32 if n_out < 8192 else 64)
    _few_kernel[(triton.cdiv(n_rows, block_m) * (n_out // block_n),)](
        x8_tI, x_scale_bt, TensorDescriptor.from_tensor(codes_OI, [block_n, FP8_BLOCK]), scale_ob, out_tO, n_rows,
        width, n_out, block_m, block_n, FP8_BLOCK, num_warps=4, num_stages=5,
    )  # fmt: skip
    return out_tO


@triton.jit(do_not_specialize=["n_rows"])
def _few_kernel(
    x_ptr, x_scale_ptr, w_desc, scale_ptr, out_ptr, n_rows, WIDTH: tl.constexpr, N_OUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n_blocks = (n_rows + BM - 1) // BM
    n = (tl.program_id(0) // n_blocks) * BN
    row = (tl.program_id(0) % n_blocks) * BM + tl.arange(0, BM)
    x_row = x_ptr + row.to(tl.int64)[:, None] * WIDTH
    out = tl.zeros((BM, BN), tl.float32)
    for k in range(0, WIDTH, BK):
        x = tl.load(x_row + k + tl.arange(0, BK), mask=(row < n_rows)[:, None], other=0.0)
        scale = tl.load(x_scale_ptr + (k // BK) * n_rows + row, mask=row < n_rows, other=0.0)
        scale = scale * tl.load(scale_ptr + (n // BK) * (WIDTH // BK) + k // BK)
        out += tl.dot(x, w_desc.load([n, k]).T) * scale[:, None]
    column = n + tl.arange(0, BN)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * N_OUT + column, out, mask=(row < n_rows)[:, None])
