"""Weights of an FP8 checkpoint as they are stored: codes and the scales of their 128 x 128 blocks, nothing rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdeploy.kernels.weight_formats import FP8_BLOCK
from fastdeploy.models.weights import StoredTensor

Blocks = tuple[Tensor, Tensor]  # float8_e4m3fn [O, I] and float32 [O / 128, I / 128]


def in_blocks(part: slice | None) -> slice | None:
    """A slice of rows or columns as one of blocks. Raises ValueError when it does not lie on their edges."""
    if part is None:
        return None
    if part.start % FP8_BLOCK or part.stop % FP8_BLOCK:
        raise ValueError(f"{part}: no slice of whole blocks of {FP8_BLOCK}")
    return slice(part.start // FP8_BLOCK, part.stop // FP8_BLOCK)


def read_blocks(parts: Sequence[StoredTensor], orders: Sequence[Callable[[Tensor], Tensor] | None]) -> Blocks | None:
    """Matrices of equal width one above the other, the rows of each in another order where `orders` says so.

    None when one of them is not stored in such blocks, or its rows would leave theirs.
    """
    codes, scales = [], []
    for part, order in zip(parts, orders, strict=True):
        stored = part.as_fp8()
        if stored is None:
            return None
        code_OI = stored[0].read().view(torch.uint8)  # not all operations know 8-bit floats
        if order is not None:
            block_O1 = torch.arange(code_OI.shape[0])[:, None] // FP8_BLOCK
            if not torch.equal(order(block_O1), block_O1):
                return None
            code_OI = order(code_OI)
        codes.append(code_OI)
        scales.append(stored[1].read().float())
    return torch.cat(codes).view(torch.float8_e4m3fn), torch.cat(scales)
