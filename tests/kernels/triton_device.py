"""Where kernel tests run: on the GPU, or on the CPU in Triton's interpreter where Triton is installed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# The interpreter's matrix product of bfloat16 is wrong.
DTYPES = [torch.float32, torch.bfloat16] if HAS_GPU else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory full of NaN: what a kernel forgets to write shows."""
    return tensor.fill_(float("nan"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; NaN anywhere gives NaN."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))
