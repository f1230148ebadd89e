"""One stored weight that multiplies: plain, of fewer bits, packed by oneDNN, or in panels of our own kernels.

On a CPU that computes in float32, our kernels are the fastest at every number of rows that was tried but for some of
512, where oneDNN was level; and they keep a checkpoint's 16-bit weights as they are. oneDNN serves where there is no C
compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.config.schema import Quantization
from fastdeploy.distributed.shared_weights import WeightMemory
from fastdeploy.errors import ConfigError
from fastdeploy.kernels.cpu.library import WEIGHT_TYPES, kernels_for
from fastdeploy.kernels.cpu.panels import PanelMatmul, to_panels
from fastdeploy.kernels.weight_formats import FP8_BLOCK, dequantize, quantize, quantize_blocks
from fastdeploy.layers.placement import Placement
from fastdeploy.models.fp8_blocks import Blocks

# Rows for which oneDNN chooses the blocked layout; the layout serves every other row count as well.
_PACK_ROWS = 16
_MIN_FP8_ROWS = 1024
_HOPPER = 9  # major compute capability


class Matmul(Protocol):
    """A weight W [O, I] in the form that its device multiplies fastest with."""

    def __call__(self, x_tI: Tensor, bias_O: Tensor | None) -> Tensor:
        """`x W^T + b` [t, O] in the dtype of x, t may be 0."""
        ...

    def n_bytes(self) -> int:
        """Bytes of the weight as it is held."""
        ...


class PlainMatmul:
    """The weight as it is; implements Matmul."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI

    def __call__(self, x_tI: Tensor, bias_O: Tensor | None) -> Tensor:
        if x_tI.is_cuda and x_tI.shape[0] == 1:
            # Triton is there on GPUs only.
            from fastdeploy.kernels.linear_one import linear_one

            return linear_one(x_tI, self.weight_OI, bias_O)
        return functional.linear(x_tI, self.weight_OI, bias_O)

    def n_bytes(self) -> int:
        return self.weight_OI.nbytes


class Fp8Matmul:
    """A weight on a Hopper GPU, also in block-wise FP8; implements Matmul. Raises ConfigError on other devices.

    Many rows (a prefill step) are rounded to FP8 and multiplied so. With few rows cuBLAS's block-wise FP8 product is
    slower than its bfloat16 one (13.5 against 9.5 us for 64 rows of 3584 x 2560 on an H200), so they take the weight as
    it was stored; both forms together are small beside the experts.
    """

    def __init__(self, weight_OI: Tensor, blocks: Blocks | None = None) -> None:
        """`blocks`: its codes and scales, where a checkpoint has them."""
        if torch.cuda.get_device_capability(weight_OI.device)[0] != _HOPPER:
            raise ConfigError("--quantization block_wise_fp8: needs a Hopper GPU; leave it out on this one")
        self.plain = PlainMatmul(weight_OI)
        codes_OI, scale_ob = quantize_blocks(weight_OI) if blocks is None else blocks
        self.codes_OI, self.scale_ob = codes_OI.to(weight_OI.device), scale_ob.to(weight_OI.device)

    def __call__(self, x_tI: Tensor, bias_O: Tensor | None) -> Tensor:
        if x_tI.shape[0] < _MIN_FP8_ROWS:
            return self.plain(x_tI, bias_O)
        from fastdeploy.kernels.fp8_linear import fp8_linear

        y_tO = fp8_linear(x_tI, self.codes_OI, self.scale_ob)
        return y_tO if bias_O is None else y_tO.add_(bias_O)

    def n_bytes(self) -> int:
        return self.plain.n_bytes() + self.codes_OI.nbytes + self.scale_ob.nbytes


class IntMatmul:
    """A weight of 8- or 4-bit whole numbers, see kernels/weight_formats.py; implements Matmul.

    A GPU widens codes as it multiplies. A CPU widens the whole weight first, every time: memory is saved, not time.
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __call__(self, x_tI: Tensor, bias_O: Tensor | None) -> Tensor:
        if x_tI.is_cuda:
            # Triton is there on GPUs only.
            from fastdeploy.kernels.int_matmul import int_linear

            return int_linear(x_tI, self.codes, self.scale, bias_O)
        weight_OI = dequantize(self.codes, self.scale, x_tI.shape[1]).to(x_tI.dtype)
        return functional.linear(x_tI, weight_OI, bias_O)

    def n_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


class OneDnnMatmul:
    """A float32 weight in oneDNN's blocked form; implements Matmul."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACK_ROWS)
        self._n_out, self._n_bytes = weight_OI.shape[0], weight_OI.nbytes

    def __call__(self, x_tI: Tensor, bias_O: Tensor | None) -> Tensor:
        # oneDNN answers garbage shapes for zero rows; an empty batch is a legal step of an idle rank.
        if x_tI.shape[0] == 0:
            return x_tI.new_empty(0, self._n_out)
        y_tO: Tensor = torch.ops.mkldnn._linear_pointwise(x_tI, self._packed, bias_O, "none", [], "")
        return y_tO

    def n_bytes(self) -> int:
        return self._n_bytes


def stored_dtype(part_dtypes: set[torch.dtype], place: Placement) -> torch.dtype:
    """In which dtype to hold a weight whose parts come in these: theirs where it can stay, else that of `place`."""
    if len(part_dtypes) == 1 and kernels_for(place.device, place.dtype) is not None:
        dtype = next(iter(part_dtypes))
        if dtype.itemsize == 2 and dtype in WEIGHT_TYPES:
            return dtype
    return place.dtype


def make_matmul(weight_OI: Tensor, place: Placement) -> Matmul:
    """The weight, of a dtype that `stored_dtype` gives or of another floating-point dtype, ready to multiply."""
    return load_matmul(lambda: weight_OI, weight_OI.shape[0], place)


def load_matmul(
    read_OI: Callable[[], Tensor],
    n_out: int,
    place: Placement,
    read_fp8: Callable[[], Blocks | None] = lambda: None,
) -> Matmul:
    """The same for a weight [n_out, I] that is read only where it has to be, see `WeightMemory`.

    `read_fp8` gives its blocks where they are stored.
    """
    if place.quantization == "block_wise_fp8":
        weight_OI = read_OI().to(place.dtype)
        fits = weight_OI.shape[0] % FP8_BLOCK == 0 == weight_OI.shape[1] % FP8_BLOCK
        return Fp8Matmul(weight_OI, read_fp8()) if fits else PlainMatmul(weight_OI)
    if place.quantization is not None:
        return _int_matmul(read_OI, place.quantization, place.weights)
    if place.device.type != "cpu" or place.dtype != torch.float32:
        return PlainMatmul(place.weights.keep(lambda: read_OI().to(place.dtype)))
    kernels = kernels_for(place.device, place.dtype)
    if kernels is not None:
        return PanelMatmul(kernels, place.weights.keep(lambda: _panels_of(read_OI())), n_out)
    if torch.backends.mkldnn.is_available():
        return OneDnnMatmul(read_OI().float())
    return PlainMatmul(place.weights.keep(lambda: read_OI().float()))


def _int_matmul(read_OI: Callable[[], Tensor], name: Quantization, memory: WeightMemory) -> IntMatmul:
    made = cache(lambda: quantize(read_OI(), name))  # once, and only where it has to be
    return IntMatmul(memory.keep(lambda: made()[0]), memory.keep(lambda: made()[1]))


def _panels_of(weight_OI: Tensor) -> Tensor:
    return to_panels((weight_OI if weight_OI.dtype in WEIGHT_TYPES else weight_OI.float())[None])
