"""RMSNorm kernels against their references."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, DTYPES, TOLERANCE, needs_triton, poison, relative_error

pytestmark = [pytest.mark.timeout(300), needs_triton]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "size"), [(0, 64), (1, 2560), (3, 2560), (7, 100), (33, 1), (2, 4097)])
def test_norm_and_norm_after_addition(n_tokens: int, size: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

    x_tH = torch.randn(n_tokens, size, device=DEVICE).to(dtype) * 3
    residual_tH = torch.randn(n_tokens, size, device=DEVICE).to(dtype)
    weight_H = torch.randn(size, device=DEVICE).to(dtype)
    assert relative_error(rms_norm(x_tH, weight_H, 1e-5), rms_norm_ref(x_tH, weight_H, 1e-5)) < TOLERANCE[dtype]
    normed_tH, sum_tH = add_rms_norm(x_tH, residual_tH, weight_H, 1e-5)
    expected_tH, expected_sum_tH = add_rms_norm_ref(x_tH, residual_tH, weight_H, 1e-5)
    assert torch.equal(sum_tH, expected_sum_tH)
    assert relative_error(normed_tH, expected_tH) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [0, 1, 5])
def test_in_place_over_some_heads_leaves_the_others(n_tokens: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.rms_norm import rms_norm_, rms_norm_ref

    qkv_thd = torch.randn(n_tokens, 7, 64, device=DEVICE).to(dtype)
    poison(qkv_thd[:, 5:])
    weight_d = torch.randn(64, device=DEVICE).to(dtype)
    expected_thd = rms_norm_ref(qkv_thd[:, 2:5], weight_d, 1e-6)
    before_thd = qkv_thd[:, :2].clone()
    rms_norm_(qkv_thd[:, 2:5], weight_d, 1e-6)
    assert relative_error(qkv_thd[:, 2:5], expected_thd) < TOLERANCE[dtype]
    assert torch.equal(qkv_thd[:, :2], before_thd)
    assert bool(qkv_thd[:, 5:].isnan().all())
