"""The linear layer with whole-number weights against its reference."""

from __future__ import annotations

import pytest
import torch
from poisoned import NUMPY_WARNINGS, poisoned_memory
from triton_device import DEVICE, DTYPES, TOLERANCE, needs_triton, relative_error

pytestmark = [pytest.mark.timeout(300), needs_triton, NUMPY_WARNINGS, pytest.mark.usefixtures("poisoned_memory")]
__all__ = ["poisoned_memory"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wint8", "wint4"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("n_rows", "n_in", "n_out"),
    [(0, 128, 64), (1, 2560, 96), (1, 1, 1), (7, 129, 33), (16, 64, 130), (19, 576, 70), (65, 200, 65), (515, 72, 140)],
)
def test_linear(n_rows: int, n_in: int, n_out: int, with_bias: bool, name: str, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.int_matmul import int_linear, int_linear_ref
    from fastdeploy.kernels.weight_formats import quantize

    codes, scale = quantize(torch.randn(n_out, n_in, device=DEVICE), name)
    x_tI = torch.randn(n_rows, n_in, device=DEVICE).to(dtype)
    bias_O = torch.randn(n_out, device=DEVICE).to(dtype) if with_bias else None
    found_tO = int_linear(x_tI, codes, scale, bias_O)
    assert found_tO.shape == (n_rows, n_out) and found_tO.dtype == dtype
    assert relative_error(found_tO, int_linear_ref(x_tI, codes, scale, bias_O)) < TOLERANCE[dtype]


def test_rows_that_are_not_contiguous() -> None:
    from fastdeploy.kernels.int_matmul import int_linear
    from fastdeploy.kernels.weight_formats import quantize

    codes, scale = quantize(torch.randn(40, 130, device=DEVICE), "wint4")
    x_tI = torch.randn(130, 5, device=DEVICE).t()
    assert torch.equal(int_linear(x_tI, codes, scale), int_linear(x_tI.contiguous(), codes, scale))
