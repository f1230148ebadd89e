"""silu(gate) * up of a gated feed-forward network, one pass over both halves."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.overlap import await_previous, overlaps


def silu_mul_ref(both_tX: Tensor) -> Tensor:
    """What `silu_mul` computes."""
    gate_tM, up_tM = both_tX.float().chunk(2, dim=-1)
    return (functional.silu(gate_tM) * up_tM).to(both_tX.dtype)


def silu_mul(both_tX: Tensor) -> Tensor:
    """[t, M] from [t, 2M], gate columns first, up columns behind; computed in float32."""
    assert both_tX.is_contiguous()
    n_tokens, width = both_tX.shape[0], both_tX.shape[1] // 2
    out_tM = both_tX.new_empty(n_tokens, width)
    if out_tM.numel():
        block = min(1024, triton.next_power_of_2(width))
        grid = (n_tokens, triton.cdiv(width, block))
        pdl = overlaps(both_tX.device)
        _silu_mul_kernel[grid](both_tX, out_tM, width, block, pdl, num_warps=max(1, block // 256), launch_pdl=pdl)
    return out_tM


@triton.jit
def _silu_mul_kernel(both_ptr, out_ptr, M: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    gate = tl.load(both_ptr + token * 2 * M + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + token * 2 * M + M + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * M + column, gate * tl.sigmoid(gate) * up, mask=inside)
