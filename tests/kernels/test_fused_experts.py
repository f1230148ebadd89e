"""The experts of a GPU against the reference ones, and the way of their weights to the device."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from triton_device import HAS_GPU, needs_triton, relative_error

from fastdeploy.config.schema import Quantization
from fastdeploy.layers.upload import Uploader

pytestmark = pytest.mark.timeout(300)
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def test_upload_converts_and_fills_everything() -> None:
    sources = [torch.randn(n, 1000, dtype=torch.float64) for n in (0, 1, 7, 3000)]
    targets = [torch.full(s.shape, float("nan"), dtype=torch.bfloat16, device=DEVICE) for s in sources]
    with Uploader(DEVICE, n_threads=3) as uploader:
        for source, target in zip(sources, targets, strict=True):
            uploader.put(target, lambda source=source: source)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target.cpu(), source.bfloat16())


def test_an_error_of_a_reading_thread_is_raised_at_the_end() -> None:
    def fail() -> torch.Tensor:
        time.sleep(0.01)
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"), Uploader(DEVICE, n_threads=2) as uploader:
        uploader.put(torch.empty(2, 2, device=DEVICE), fail)
        uploader.put(torch.empty(2, 2, device=DEVICE), lambda: torch.ones(2, 2))


@needs_triton
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", [None, "block_wise_fp8", "wint8", "wint4"])
@pytest.mark.parametrize("n_tokens", [1, 9, 700])
def test_same_as_experts_one_after_the_other(n_tokens: int, quantization: Quantization | None) -> None:
    from fastdeploy.kernels.moe import fused_moe_ref
    from fastdeploy.layers.mlp import GatedMLP
    from fastdeploy.layers.moe.experts import Experts
    from fastdeploy.layers.moe.fused_experts import FusedExperts
    from fastdeploy.layers.placement import Placement
    from fastdeploy.models.random_weights import RandomWeights

    n_local, first, hidden_size, width = 6, 3, 512, 256
    if quantization == "block_wise_fp8" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    weights = RandomWeights(1, 0)
    fused = FusedExperts(
        n_local, hidden_size, width, Placement(torch.bfloat16, DEVICE, quantization=quantization),
        shared_width=2 * width,
    )  # fmt: skip
    fused.load(weights, "experts", first, "shared")
    place = Placement(torch.float32, torch.device("cpu"))
    experts, shared = Experts(n_local, hidden_size, width, place), GatedMLP(hidden_size, 2 * width, place)
    experts.load(weights, "experts", first)
    shared.load(weights, "shared")
    x_tH = torch.randn(n_tokens, hidden_size).bfloat16()
    ids_tk = torch.rand(n_tokens, n_local + 1).argsort(-1)[:, :3]
    weight_tk = torch.rand(n_tokens, 3)
    expected_tH = experts(x_tH.float(), SimpleNamespace(expert_tk=ids_tk, weight_tk=weight_tk)) + shared(x_tH.float())
    found_tH = fused(x_tH.to(DEVICE), SimpleNamespace(expert_tk=ids_tk.to(DEVICE), weight_tk=weight_tk.to(DEVICE)))
    assert (
        relative_error(found_tH.cpu(), expected_tH)
        < {None: 0.02, "block_wise_fp8": 0.08, "wint8": 0.03, "wint4": 0.2}[quantization]
    )
    assert fused.weights is not None and fused.n_bytes() > 0
    same_tH = fused_moe_ref(x_tH.to(DEVICE), fused.weights, ids_tk.to(DEVICE), weight_tk.to(DEVICE))
    assert relative_error(found_tH, same_tH) < (0.06 if quantization == "block_wise_fp8" else 0.02)
