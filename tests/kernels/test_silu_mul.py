"""silu(gate) * up against its reference."""

from __future__ import annotations

import pytest
import torch
from poisoned import NUMPY_WARNINGS, poisoned_memory
from triton_device import DEVICE, DTYPES, TOLERANCE, needs_triton, relative_error

pytestmark = [pytest.mark.timeout(300), needs_triton, NUMPY_WARNINGS, pytest.mark.usefixtures("poisoned_memory")]
__all__ = ["poisoned_memory"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(0, 8), (1, 1), (3, 1536), (33, 100), (2, 3000)])
def test_matches_reference(n_tokens: int, width: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.silu_mul import silu_mul, silu_mul_ref

    both_tX = (torch.randn(n_tokens, 2 * width, device=DEVICE) * 4).to(dtype)
    assert relative_error(silu_mul(both_tX), silu_mul_ref(both_tX)) < TOLERANCE[dtype]
