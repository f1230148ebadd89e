"""Weights of fewer bits, in plain torch: made once, when a weight is loaded.

| name | codes | scales |
| block_wise_fp8 | float8_e4m3fn [O, I] | float32 [ceil(O / 128), ceil(I / 128)], one per block of 128 x 128 |
| wint8 | int8 [O, I] | float32 [O], one per row |
| wint4 | uint8 [O, ceil(I / 128) * 64] | bfloat16 [O, ceil(I / 128)], one per group of 128 columns of a row |

All may have axes before these. A scale is what a code is multiplied with; the dtype of codes tells the format. A wint4
code is value + 8, values -8 to 7. Byte j of a group holds the codes of its columns j and j + 64, in the low and high
half, so that unpacking shuffles nothing. A last group that is not full is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.config.schema import Quantization

FP8_BLOCK = 128
INT4_GROUP = 128
_FP8_MAX = 448.0
_MIN_SCALE = 1e-12  # an all-zero block would divide by zero

CODE_DTYPES: Mapping[Quantization, torch.dtype] = MappingProxyType(
    {"block_wise_fp8": torch.float8_e4m3fn, "wint8": torch.int8, "wint4": torch.uint8}
)


def quantize(weight_OI: Tensor, name: Quantization) -> tuple[Tensor, Tensor]:
    """Codes and scales, see above, of a weight [..., O, I] of any float dtype."""
    return _QUANTIZE[name](weight_OI)


def dequantize(codes: Tensor, scales: Tensor, n_in: int) -> Tensor:
    """float32 values [..., O, I] of what `quantize` returned; `n_in` is I."""
    match codes.dtype:
        case torch.float8_e4m3fn:
            return dequantize_blocks(codes, scales)
        case torch.int8:
            return codes.float() * scales[..., None]
        case torch.uint8:
            return _dequantize_int4(codes, scales)[..., :n_in]
        case other:
            raise ValueError(f"codes of {other}: no weight format has these")


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes [..., O, I] and float32 scales [..., ceil(O / 128), ceil(I / 128)] of a weight or a stack of them."""
    rows, columns = weight_OI.shape[-2:]
    pad = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    padded = functional.pad(weight_OI.float(), pad)
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scale = (blocks.abs().amax((-3, -1)) / _FP8_MAX).clamp_min(_MIN_SCALE)
    codes = (blocks / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def dequantize_blocks(codes_OI: Tensor, scales: Tensor) -> Tensor:
    """float32 values of what `quantize_blocks` returned."""
    rows, columns = codes_OI.shape[-2:]
    wide = scales.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :].repeat_interleave(FP8_BLOCK, -1)[..., :columns]
    return codes_OI.float() * wide


def _quantize_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    values = weight_OI.float()
    scale = (values.abs().amax(-1) / 127).clamp_min(_MIN_SCALE)
    return (values / scale[..., None]).round().to(torch.int8), scale


def _quantize_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The value farthest from zero becomes -8, by a negative scale where it is positive: all sixteen codes are used.

    On normal numbers this is 12% closer than -7 to 7.
    """
    groups = functional.pad(weight_OI.float(), (0, -weight_OI.shape[-1] % INT4_GROUP)).unflatten(-1, (-1, INT4_GROUP))
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (farthest / -8).to(torch.bfloat16)
    scale = torch.where(scale.abs() < _MIN_SCALE, torch.full_like(scale, _MIN_SCALE), scale)
    codes = ((groups / scale.float()).round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return (low | high << 4).flatten(-2), scale[..., 0]


def _dequantize_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """With the zeros that fill up the last group."""
    bytes_ = packed.unflatten(-1, (-1, INT4_GROUP // 2))
    values = torch.cat((bytes_ & 15, bytes_ >> 4), -1).float() - 8
    return (values * scales.float()[..., None]).flatten(-2)


_QUANTIZE: Mapping[Quantization, Callable[[Tensor], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"block_wise_fp8": quantize_blocks, "wint8": _quantize_int8, "wint4": _quantize_int4}
)
