"""Weights of fewer bits and back, in plain torch."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, relative_error

from fastdeploy.config.quantization import matrix_bytes
from fastdeploy.kernels.weight_formats import CODE_DTYPES, dequantize, quantize

pytestmark = pytest.mark.timeout(60)
SHAPES = [(0, 4), (1, 1), (5, 7), (130, 200), (128, 128), (3, 64, 576), (2, 33, 129)]
ERROR = {"block_wise_fp8": 0.04, "wint8": 0.012, "wint4": 0.13}


@pytest.mark.parametrize("name", list(CODE_DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_come_back_and_take_the_bytes_they_should(name: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    codes, scales = quantize(weight, name)
    assert codes.dtype == CODE_DTYPES[name] and codes.shape[:-1] == shape[:-1]
    back = dequantize(codes, scales, shape[-1])
    assert back.shape == shape and back.dtype == torch.float32
    assert relative_error(back, weight) < ERROR[name]
    n_stack = weight[..., 0, 0].numel() if weight.numel() else 1
    assert codes.nbytes + scales.nbytes == n_stack * matrix_bytes(name, *shape[-2:], item=4)


@pytest.mark.parametrize("name", list(CODE_DTYPES))
def test_zeros_stay_zeros(name: str) -> None:
    codes, scales = quantize(torch.zeros(3, 130, device=DEVICE), name)
    assert bool(dequantize(codes, scales, 130).eq(0).all())


@pytest.mark.parametrize("name", ["wint8", "wint4"])
def test_what_is_on_the_grid_is_exact(name: str) -> None:
    """Whole multiples of a power of two, the farthest from zero of either sign."""
    low, high = (-127, 127) if name == "wint8" else (-8, 7)
    grid = torch.randint(low, high + 1, (6, 300), generator=torch.Generator().manual_seed(1)).float()
    grid[:, ::128] = torch.tensor([low, -low, low, -low, low, -low])[:, None]
    if name == "wint4":
        grid[1::2] = grid[1::2].clamp_min(-7)  # with +8 among them the scale is negative, and -8 is not there
    weight = grid * torch.tensor([1.0, 0.25, 2**-20, 8.0, 2.0, 1.0])[:, None]
    codes, scales = quantize(weight, name)
    assert torch.equal(dequantize(codes, scales, 300), weight)


def test_a_row_or_group_of_large_numbers_does_not_coarsen_others() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    loud = weight.clone()
    loud[0] *= 1000
    for name in ("wint8", "wint4"):
        a, b = (dequantize(*quantize(each, name), 256) for each in (weight, loud))
        assert torch.equal(a[1:], b[1:])
    loud = weight.clone()
    loud[:, :128] *= 1000
    a, b = (dequantize(*quantize(each, "wint4"), 256) for each in (weight, loud))
    assert torch.equal(a[:, 128:], b[:, 128:])
