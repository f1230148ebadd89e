"""RMSNorm of float32 rows on a CPU, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdeploy.kernels.cpu.library import CpuKernels


def rms_norm(kernels: CpuKernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; a new tensor."""
    x = x.contiguous()
    y = torch.empty_like(x)
    size = weight.shape[0]
    n_rows = x.numel() // size
    kernels.rms_norm(x.data_ptr(), None, weight.data_ptr(), None, y.data_ptr(), n_rows, size, eps)
    return y


def add_rms_norm(kernels: CpuKernels, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual), both new."""
    x, residual = x.contiguous(), residual.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    size = weight.shape[0]
    out, out_total, n_rows = y.data_ptr(), total.data_ptr(), x.numel() // size
    kernels.rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out_total, out, n_rows, size, eps)
    return y, total
