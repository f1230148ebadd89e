"""The router kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from poisoned import NUMPY_WARNINGS, poisoned_memory
from triton_device import DEVICE, DTYPES, needs_triton

pytestmark = [pytest.mark.timeout(300), needs_triton, NUMPY_WARNINGS, pytest.mark.usefixtures("poisoned_memory")]
__all__ = ["poisoned_memory"]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "hidden_size"), [(0, 64), (1, 640), (7, 300), (35, 128), (1030, 32)])
def test_same_experts_and_weights(n_tokens: int, hidden_size: int, dtype: torch.dtype, has_bias: bool) -> None:
    from fastdeploy.kernels.gate import N_ARRIVED, choose_experts, choose_experts_ref, split_gate_weight

    n_experts, k, norm_min = (12, 3, 1e-12) if has_bias else (16, 5, None)
    x_tH = torch.randn(n_tokens, hidden_size, device=DEVICE).to(dtype)
    weight_neH = split_gate_weight(torch.randn(n_experts, hidden_size, device=DEVICE) / hidden_size**0.5, dtype)
    bias_e = torch.randn(n_experts, device=DEVICE) * 0.1 if has_bias else None
    arrived_b = torch.zeros(N_ARRIVED, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the counters must be ready for the next step
        expert_tk, weight_tk = choose_experts(x_tH, weight_neH, bias_e, k, norm_min, arrived_b)
    expected_tk, expected_weight_tk = choose_experts_ref(x_tH, weight_neH, bias_e, k, norm_min)
    assert torch.equal(expert_tk, expected_tk)
    assert torch.allclose(weight_tk, expected_weight_tk, atol=1e-5)
    assert not arrived_b.any()


def test_ties_go_to_the_lowest_id_and_nan_stays_in_range() -> None:
    from fastdeploy.kernels.gate import N_ARRIVED, choose_experts, split_gate_weight

    weight_eH = torch.zeros(8, 64, device=DEVICE)
    weight_eH[5] = 1
    x_tH = torch.ones(3, 64, device=DEVICE)
    x_tH[1] = -1
    x_tH[2] = float("nan")
    arrived_b = torch.zeros(N_ARRIVED, dtype=torch.int32, device=DEVICE)
    expert_tk, _ = choose_experts(x_tH, split_gate_weight(weight_eH, torch.float32), None, 3, None, arrived_b)
    assert expert_tk[:2].tolist() == [[5, 0, 1], [0, 1, 2]]
    assert bool(((expert_tk >= 0) & (expert_tk < 8)).all())


def test_three_parts_are_the_float32_weight_exactly() -> None:
    from fastdeploy.kernels.gate import split_gate_weight

    weight_eH = torch.randn(6, 40) * torch.tensor([1e-4, 1e-2, 1, 1e2, 1e4, 1e6])[:, None]
    parts = split_gate_weight(weight_eH, torch.bfloat16)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().sum(0), weight_eH.double())
