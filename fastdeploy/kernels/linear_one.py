"""A linear layer for a single row, at the speed at which its weights can be read.

Every program reads a few rows of the weight whole, keeps several blocks of them on their way, and begins with them
while the kernel before it still works on x. Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.overlap import await_previous, overlaps

_WIDE = 3072  # outputs from which programs of more outputs each fill a GPU


def linear_one_ref(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in float32, in the dtype of x."""
    y_1O = functional.linear(x_1I.float(), weight_OI.float(), None if bias_O is None else bias_O.float())
    return y_1O.to(x_1I.dtype)


def linear_one(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As the reference, for contiguous x [1, I] and weight."""
    n_out, n_in = weight_OI.shape
    assert x_1I.shape == (1, n_in), f"x has shape {tuple(x_1I.shape)} instead of (1, {n_in})"
    y_1O = torch.empty((1, n_out), dtype=x_1I.dtype, device=x_1I.device)
    outputs, inputs = (8, 256) if n_out >= _WIDE else (4, 512)
    pdl = overlaps(x_1I.device)
    _linear_one_kernel[(triton.cdiv(n_out, outputs),)](
        x_1I,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        y_1O,
        N_OUT=n_out,
        N_IN=n_in,
        HAS_BIAS=bias_O is not None,
        OUTPUTS=outputs,
        INPUTS=inputs,
        STAGES=4,
        PDL=pdl,
        num_warps=2,
        launch_pdl=pdl,
    )
    return y_1O


@triton.jit
def _linear_one_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    N_OUT: tl.constexpr,
    N_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < N_OUT
    place = tl.arange(0, INPUTS)
    weight_at = weight_ptr + output.to(tl.int64)[:, None] * N_IN
    inside = place < N_IN
    weight = tl.load(weight_at + place[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
    await_previous(PDL)
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    products = weight.to(tl.float32) * x.to(tl.float32)[None, :]
    for start in tl.range(INPUTS, N_IN, INPUTS, num_stages=STAGES):
        at = start + place
        inside = at < N_IN
        weight = tl.load(weight_at + at[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        products += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(products, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + output, y.to(y_ptr.dtype.element_ty), mask=exists)
