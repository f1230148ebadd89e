"""The weights of many experts on their way from a checkpoint into two stacks of one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdeploy.config.schema import Quantization
from fastdeploy.kernels.weight_formats import FP8_BLOCK, quantize
from fastdeploy.layers.placement import Placement
from fastdeploy.layers.upload import Uploader
from fastdeploy.models.fp8_blocks import in_blocks
from fastdeploy.models.weights import StoredTensor

Stack = tuple[Tensor, Tensor | None]  # weights or codes, and the scales of codes


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a stored matrix: gate, up or down of one expert."""

    stored: StoredTensor
    rows: slice | None = None
    columns: slice | None = None

    def read(self) -> Tensor:
        """Its numbers."""
        return self.stored.read(self.rows, self.columns)

    def readers(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]] | None:
        """What reads its codes and its scales, where it is stored in FP8 blocks."""
        stored = self.stored.as_fp8()
        if stored is None:
            return None
        codes, scales = stored
        return (
            partial(codes.read, self.rows, self.columns),
            partial(scales.read, in_blocks(self.rows), in_blocks(self.columns)),
        )


Expert = tuple[Part, Part, Part]  # gate, up, down


def load_stacks(experts: Sequence[Expert], hidden_size: int, width: int, place: Placement) -> tuple[Stack, Stack]:
    """[e, 2M, H], gate rows first, and [e, H, M], in the format that `place` names.

    FP8 blocks of a checkpoint stay as they are stored, if all experts have them.
    """
    shapes = ((len(experts), 2 * width, hidden_size), (len(experts), hidden_size, width))
    if place.quantization == "block_wise_fp8":
        readers = [[part.readers() for part in expert] for expert in experts]
        if all(reader is not None for parts in readers for reader in parts):
            codes = [[reader[0] for reader in parts if reader] for parts in readers]
            scales = [[reader[1] for reader in parts if reader] for parts in readers]
            blocks = [(n, rows // FP8_BLOCK, columns // FP8_BLOCK) for n, rows, columns in shapes]
            gate_up, down = _fill(codes, shapes, torch.float8_e4m3fn, place.device)
            gate_up_scale, down_scale = _fill(scales, blocks, torch.float32, place.device)
            return (gate_up, gate_up_scale), (down, down_scale)
    gate_up, down = _fill([[part.read for part in expert] for expert in experts], shapes, place.dtype, place.device)
    if place.quantization is None:
        return (gate_up, None), (down, None)
    return _quantize(gate_up, place.quantization), _quantize(down, place.quantization)


def _fill(
    read: Sequence[Sequence[Callable[[], Tensor]]],
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Both stacks, from what reads gate, up and down of each expert."""
    gate_up, down = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    half = gate_up.shape[1] // 2
    with Uploader(device) as uploader:
        for i, (read_gate, read_up, read_down) in enumerate(read):
            uploader.put(gate_up[i, :half], read_gate)
            uploader.put(gate_up[i, half:], read_up)
            uploader.put(down[i], read_down)
    return gate_up, down


def _quantize(stack: Tensor, name: Quantization) -> tuple[Tensor, Tensor]:
    """Expert by expert, so that the float32 copies in between stay small."""
    parts = [quantize(weight, name) for weight in stack]
    return torch.stack([codes for codes, _ in parts]), torch.stack([scale for _, scale in parts])
