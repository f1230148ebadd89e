"""Rounding activations to FP8 and the FP8 linear layer against their references."""

from __future__ import annotations

import pytest
import torch
from poisoned import NUMPY_WARNINGS, poisoned_memory
from triton_device import DEVICE, DTYPES, HAS_GPU, needs_triton, relative_error

pytestmark = [pytest.mark.timeout(300), needs_triton, NUMPY_WARNINGS, pytest.mark.usefixtures("poisoned_memory")]
__all__ = ["poisoned_memory"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "width"), [(0, 128), (1, 384), (9, 2560)])
def test_rows(n_rows: int, width: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.quantize import quantize_rows, quantize_rows_ref

    x_tI = (torch.randn(n_rows, width, device=DEVICE) * 3).to(dtype)
    x_tI[:1, :128] = 0
    (codes, scales), (expected, expected_scales) = quantize_rows(x_tI), quantize_rows_ref(x_tI)
    assert torch.allclose(scales, expected_scales, rtol=1e-6)
    # The interpreter rounds to FP8 towards zero.
    assert relative_error(codes.float(), expected.float()) < (1e-3 if HAS_GPU else 0.06)


def test_rows_behind_the_last_offset_are_left_alone() -> None:
    from fastdeploy.kernels.quantize import quantize_rows

    x_tI = torch.randn(6, 256, device=DEVICE)
    offset_g = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
    (codes, scales), (plain, plain_scales) = quantize_rows(x_tI, offset_g), quantize_rows(x_tI)
    assert torch.equal(codes[:4].float(), plain[:4].float())
    assert torch.equal(scales[:, :4], plain_scales[:, :4])
    assert bool(scales[:, 4:].isnan().all())


@pytest.mark.parametrize("width", [384, 512])
@pytest.mark.parametrize("n_rows", [0, 1, 17, 33, 50])
def test_fp8_linear(n_rows: int, width: int) -> None:
    from fastdeploy.kernels.fp8_linear import fp8_linear, fp8_linear_ref
    from fastdeploy.kernels.weight_formats import quantize_blocks

    codes, scales = quantize_blocks(torch.randn(256, width, device=DEVICE))
    x_tI = torch.randn(n_rows, width, device=DEVICE, dtype=DTYPES[-1])
    found = fp8_linear(x_tI, codes, scales)
    assert found.shape == (n_rows, 256)
    assert relative_error(found, fp8_linear_ref(x_tI, codes, scales)) < (5e-3 if HAS_GPU else 0.08)
