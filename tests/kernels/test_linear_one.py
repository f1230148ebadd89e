"""The linear layer for one row against its reference."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, DTYPES, TOLERANCE, needs_triton, relative_error

pytestmark = [pytest.mark.timeout(300), needs_triton]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(2560, 3584), (2560, 96), (33, 7), (513, 130), (1, 1)])
def test_one_row(n_in: int, n_out: int, with_bias: bool, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.linear_one import linear_one, linear_one_ref

    x_1I = torch.randn(1, n_in, device=DEVICE).to(dtype)
    weight_OI = torch.randn(n_out, n_in, device=DEVICE).to(dtype)
    bias_O = torch.randn(n_out, device=DEVICE).to(dtype) if with_bias else None
    found_1O = linear_one(x_1I, weight_OI, bias_O)
    assert relative_error(found_1O, linear_one_ref(x_1I, weight_OI, bias_O)) < TOLERANCE[dtype]


def test_other_row_counts_are_refused() -> None:
    from fastdeploy.kernels.linear_one import linear_one

    with pytest.raises(AssertionError, match=r"\(2, 8\)"):
        linear_one(torch.zeros(2, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE))
