"""Weight formats: block-wise FP8 (scales per 128 x 128 weights, 1 x 128 activations), int8 per row, int4 per group.

FP8 is e4m3fn; a scale is what a code is multiplied with. Weights are quantised once, at load time, in plain torch;
activations are quantised on every step by a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps

FP8_BLOCK = 128
INT4_GROUP = 128
_FP8_MAX = 448.0
_MIN_SCALE = 1e-12  # an all-zero block would divide by zero


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes [..., O, I] and float32 scales [..., ceil(O / 128), ceil(I / 128)] of a weight or a stack of them."""
    rows, columns = weight_OI.shape[-2:]
    pad = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    padded = torch.nn.functional.pad(weight_OI.float(), pad)
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scale = (blocks.abs().amax((-3, -1)) / _FP8_MAX).clamp_min(_MIN_SCALE)
    codes = (blocks / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def dequantize_blocks(codes_OI: Tensor, scales: Tensor) -> Tensor:
    """float32 values of what `quantize_blocks` returned."""
    rows, columns = codes_OI.shape[-2:]
    wide = scales.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :].repeat_interleave(FP8_BLOCK, -1)[..., :columns]
    return codes_OI.float() * wide


def quantize_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., O, I] and float32 scales [..., O], one per row."""
    values = weight_OI.float()
    scale = (values.abs().amax(-1) / 127).clamp_min(_MIN_SCALE)
    return (values / scale[..., None]).round().to(torch.int8), scale


def dequantize_int8(codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """float32 values of what `quantize_int8` returned."""
    return codes_OI.float() * scale_O[..., None]


def quantize_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., O, I / 2] of two codes each, and float32 scales [..., O, I / 128], one per 128 columns of a row.

    A code is value + 8, values in -7..7; byte j holds column j in its low half and column j + I / 2 in its high half,
    so that unpacking shuffles nothing. I must be a multiple of 256.
    """
    values = weight_OI.float().unflatten(-1, (-1, INT4_GROUP))
    scale = (values.abs().amax(-1) / 7).clamp_min(_MIN_SCALE)
    codes = ((values / scale[..., None]).round() + 8).flatten(-2).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return low | high << 4, scale


def dequantize_int4(packed_OJ: Tensor, scales: Tensor) -> Tensor:
    """float32 values of what `quantize_int4` returned."""
    codes = torch.cat((packed_OJ & 15, packed_OJ >> 4), -1).float() - 8
    return codes * scales.repeat_interleave(INT4_GROUP, -1)


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
