"""Weights in panels, and the layers that compute with them in float32 on a CPU.

A panel holds 16 outputs: for each input, its 16 weights side by side. Weights stay in the type they come in (float32,
float16, bfloat16) and are widened in registers, so a step of few rows reads half as many bytes of 16-bit weights.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.cpu.library import PANEL, WEIGHT_TYPES, CpuKernels


def to_panels(weight_eOI: Tensor) -> Tensor:
    """[e, O, I] as panels [e, ceil(O / 16), I, 16], rows of zeros where O ends early; a copy of its own."""
    n_experts, n_out, n_in = weight_eOI.shape
    if n_out % PANEL:
        weight_eOI = functional.pad(weight_eOI, (0, 0, 0, -n_out % PANEL))
    return weight_eOI.view(n_experts, -1, PANEL, n_in).transpose(2, 3).clone(memory_format=torch.contiguous_format)


class _LinearStruct(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("n_in", ctypes.c_long),
        ("n_out", ctypes.c_long),
        ("type", ctypes.c_long),
    )


class PanelMatmul:
    """`x W^T + b` for one weight of `n_out` rows, in panels [1, ceil(n_out / 16), I, 16]; implements Matmul."""

    def __init__(self, kernels: CpuKernels, panels: Tensor, n_out: int) -> None:
        n_in = panels.shape[2]
        assert panels.shape == (1, -(-n_out // PANEL), n_in, PANEL), "these are not the panels of this weight"
        self._run = kernels.linear
        self._panels = panels
        self._n_out = n_out
        self._n_bytes = n_out * n_in * panels.itemsize
        self._struct = _LinearStruct(panels.data_ptr(), n_in, n_out, WEIGHT_TYPES[panels.dtype])
        self._address = ctypes.addressof(self._struct)

    def __call__(self, x_tI: Tensor, bias_O: Tensor | None) -> Tensor:
        x_tI = x_tI.contiguous()
        n_rows = x_tI.shape[0]
        y_tO = torch.empty(n_rows, self._n_out)
        bias = None if bias_O is None else bias_O.data_ptr()
        if self._run(self._address, x_tI.data_ptr(), bias, y_tO.data_ptr(), n_rows):
            raise MemoryError(f"no memory to multiply {n_rows} rows")
        return y_tO

    def n_bytes(self) -> int:
        """Bytes of the weight, without the rows of zeros."""
        return self._n_bytes


class _FFNStruct(ctypes.Structure):
    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("n_experts", ctypes.c_long),
        ("hidden", ctypes.c_long),
        ("width", ctypes.c_long),
        ("type", ctypes.c_long),
    )


class PanelFFN:
    """e gated FFNs: `down(silu(gate(x)) * up(x))`, of which each row takes the ones that it is routed to.

    Panels of the weights [e, M, H], [e, M, H] and [e, H, M], all of one dtype.
    """

    def __init__(self, kernels: CpuKernels, gate: Tensor, up: Tensor, down: Tensor) -> None:
        n_experts, hidden, width = gate.shape[0], gate.shape[2], down.shape[2]
        across, back = -(-width // PANEL), -(-hidden // PANEL)
        assert gate.shape == up.shape == (n_experts, across, hidden, PANEL), "these are not the panels of FFNs"
        assert down.shape == (n_experts, back, width, PANEL), "these are not the panels of FFNs"
        self._run = kernels.ffn
        self.panels = (gate, up, down)
        self._n_bytes = 3 * n_experts * hidden * width * gate.itemsize
        pointers = (panels.data_ptr() for panels in self.panels)
        self._struct = _FFNStruct(*pointers, n_experts, hidden, width, WEIGHT_TYPES[gate.dtype])
        self._address = ctypes.addressof(self._struct)

    def __call__(self, x_tH: Tensor, expert_tk: Tensor | None = None, weight_tk: Tensor | None = None) -> Tensor:
        """Sum over a row's experts of weight times FFN, [t, H] float32.

        expert_tk: int64, ids outside of [0, e) count nothing; weight_tk: float32. Without them every row takes the one
        FFN there is.
        """
        x_tH = x_tH.contiguous()
        n_rows, k = x_tH.shape[0], 1
        y_tH = torch.empty_like(x_tH)
        experts = weights = None
        if expert_tk is not None and weight_tk is not None:
            expert_tk, weight_tk, k = expert_tk.contiguous(), weight_tk.contiguous(), expert_tk.shape[1]
            experts, weights = expert_tk.data_ptr(), weight_tk.data_ptr()
        if self._run(self._address, x_tH.data_ptr(), y_tH.data_ptr(), n_rows, experts, weights, k):
            raise MemoryError(f"no memory for the FFNs of {n_rows} rows")
        return y_tH

    def n_bytes(self) -> int:
        """Bytes of the weights, without the rows of zeros."""
        return self._n_bytes
