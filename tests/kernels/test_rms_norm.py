"""RMSNorm kernels against their references."""

from __future__ import annotations

import pytest
import torch
from poisoned import NUMPY_WARNINGS, poisoned_memory
from triton_device import DEVICE, DTYPES, HAS_GPU, TOLERANCE, needs_triton, poison, relative_error

pytestmark = [pytest.mark.timeout(300), needs_triton, NUMPY_WARNINGS, pytest.mark.usefixtures("poisoned_memory")]
__all__ = ["poisoned_memory"]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "size"), [(0, 128), (1, 2560), (5, 384), (3, 4096)])
def test_norm_after_addition_with_codes(n_tokens: int, size: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.quantize import quantize_rows_ref
    from fastdeploy.kernels.rms_norm import add_rms_norm_fp8, add_rms_norm_fp8_ref

    x_tH, residual_tH = (torch.randn(n_tokens, size, device=DEVICE).to(dtype) * 3 for _ in range(2))
    residual_tH[:1] = -x_tH[:1]  # a row of zeros
    weight_H = torch.randn(size, device=DEVICE).to(dtype)
    normed_tH, sum_tH, rows8 = add_rms_norm_fp8(x_tH, residual_tH, weight_H, 1e-5)
    expected_tH, expected_sum_tH, _ = add_rms_norm_fp8_ref(x_tH, residual_tH, weight_H, 1e-5)
    assert torch.equal(sum_tH, expected_sum_tH)
    assert relative_error(normed_tH, expected_tH) < TOLERANCE[dtype]
    expected8 = quantize_rows_ref(normed_tH)  # of this norm: a code's step is larger than what norms differ by
    assert torch.allclose(rows8.scale_bt, expected8.scale_bt, rtol=1e-6)
    # The interpreter rounds to FP8 towards zero.
    assert relative_error(rows8.codes_tI.float(), expected8.codes_tI.float()) < (1e-3 if HAS_GPU else 0.06)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n_shared", "has_base"), [(6, 2, False), (3, 0, True), (1, 0, False)])
@pytest.mark.parametrize(("n_tokens", "size"), [(0, 64), (1, 2560), (7, 100), (2, 4097)])
def test_experts_are_added_up_before_the_norm(
    n_tokens: int, size: int, k: int, n_shared: int, has_base: bool, dtype: torch.dtype
) -> None:
    from fastdeploy.kernels.moe_rows import SlotOutputs
    from fastdeploy.kernels.slots_norm import sum_add_rms_norm, sum_add_rms_norm_ref

    n_local = 5
    expert_tk = torch.randint(0, n_local + 1, (n_tokens, k), device=DEVICE)
    y_pH = torch.randn(n_tokens * (k + n_shared), size, device=DEVICE).to(dtype)
    elsewhere_tk = torch.cat([expert_tk == n_local, torch.zeros(n_tokens, n_shared, device=DEVICE).bool()], 1)
    y_pH[elsewhere_tk.flatten()] = float("nan")  # nobody has written there
    base_tH = torch.randn(n_tokens, size, device=DEVICE).to(dtype) if has_base else None
    weight_tk = torch.rand(n_tokens, k, device=DEVICE)
    slots = SlotOutputs(y_pH, expert_tk, weight_tk, n_local, n_shared, base_tH)
    residual_tH, weight_H = torch.randn(n_tokens, size, device=DEVICE).to(dtype), torch.randn(size, device=DEVICE)
    found = sum_add_rms_norm(slots, residual_tH, weight_H.to(dtype), 1e-5)
    expected = sum_add_rms_norm_ref(slots, residual_tH, weight_H.to(dtype), 1e-5)
    for mine_tH, theirs_tH in zip(found, expected, strict=True):
        assert relative_error(mine_tH, theirs_tH) < TOLERANCE[dtype]
