"""The router of a sparse layer in float32 on a CPU, in two calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdeploy.kernels.cpu.library import CpuKernels
from fastdeploy.kernels.cpu.panels import PanelMatmul, to_panels


class _GateStruct(ctypes.Structure):
    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("n_experts", ctypes.c_long),
        ("k", ctypes.c_long),
        ("norm_min", ctypes.c_float),
    )


class PanelGate:
    """Softmax over all experts, the k best of score plus bias, weights without the bias; ties go to the lowest id.

    `norm_min`: weights are divided by their sum, which counts as at least this; None leaves them.
    """

    def __init__(
        self, kernels: CpuKernels, weight_eH: Tensor, bias_e: Tensor | None, k: int, norm_min: float | None
    ) -> None:
        self._run = kernels.choose_experts
        self._logits = PanelMatmul(kernels, to_panels(weight_eH[None]), weight_eH.shape[0])
        self._bias_e = None if bias_e is None else bias_e.float().contiguous()
        self._k = k
        bias = None if self._bias_e is None else self._bias_e.data_ptr()
        self._struct = _GateStruct(bias, weight_eH.shape[0], k, -1.0 if norm_min is None else norm_min)
        self._address = ctypes.addressof(self._struct)

    def __call__(self, x_tH: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int64 [t, k], best first, and their float32 weights [t, k]."""
        logits_te = self._logits(x_tH, None)
        n_rows = logits_te.shape[0]
        expert_tk = torch.empty(n_rows, self._k, dtype=torch.int64)
        weight_tk = torch.empty(n_rows, self._k)
        self._run(self._address, logits_te.data_ptr(), expert_tk.data_ptr(), weight_tk.data_ptr(), n_rows)
        return expert_tk, weight_tk
