"""Matmuls with weights of 8- or 4-bit whole numbers (`weight_formats.py`): a linear layer, and the experts of a step.

Codes are widened to the activations' dtype on their way to the tensor cores and scaled after the product, in float32.
A decode step reads one or half a byte for each weight; a prefill step takes the same kernels with taller tiles. The
weights are the left operand: the tensor cores' wide side holds them and not the padding of few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.moe_few import FewTile, Groups, block_of
from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.kernels.weight_formats import INT4_GROUP, dequantize

# Tiles of a linear layer by the most rows they serve; not tuned.
_LINEAR_TILES = {
    16: FewTile(bm=16, bn=32, bk=128, stages=4, warps=4),
    64: FewTile(bm=32, bn=64, bk=128, stages=4, warps=4),
    512: FewTile(bm=64, bn=64, bk=128, stages=3, warps=4),
}
_MANY_ROWS = FewTile(bm=128, bn=128, bk=64, stages=3, warps=8)


def int_linear_ref(x_tI: Tensor, codes: Tensor, scale: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What `int_linear` computes, in float32."""
    bias = None if bias_O is None else bias_O.float()
    return functional.linear(x_tI.float(), dequantize(codes, scale, x_tI.shape[1]), bias).to(x_tI.dtype)


def int_linear(x_tI: Tensor, codes: Tensor, scale: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias`, [t, O] in the dtype of x, for the codes and scales of w [O, I] in wint8 or wint4."""
    x_tI, (n_rows, n_in), n_out = x_tI.contiguous(), x_tI.shape, codes.shape[0]
    y_tO = x_tI.new_empty(n_rows, n_out)
    tile = next((tile for limit, tile in _LINEAR_TILES.items() if n_rows <= limit), _MANY_ROWS)
    n_programs, pdl = triton.cdiv(n_rows, tile.bm) * triton.cdiv(n_out, tile.bn), overlaps(x_tI.device)
    if n_programs:
        _linear_kernel[(n_programs,)](
            x_tI, codes, scale, bias_O, y_tO, n_rows, n_in, n_out, bias_O is not None, codes.dtype == torch.uint8,
            tile.bm, tile.bn, tile.bk, INT4_GROUP, pdl, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
    return y_tO


def gate_up_int(x_tH: Tensor, codes: Tensor, scale: Tensor, groups: Groups, tile: FewTile) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) of each sorted pair, [p, M]; codes of [e, 2M, H], gate rows first.

    Rows of experts that are not here are not written.
    """
    h_pM = x_tH.new_empty(groups.n_pairs, codes.shape[1] // 2)
    _multiply(x_tH.contiguous(), codes, scale, groups, tile, h_pM, gated=True)
    return h_pM


def down_int(h_pM: Tensor, codes: Tensor, scale: Tensor, groups: Groups, tile: FewTile) -> Tensor:
    """h @ down.T of each pair, [p, H], back in the order of pairs, those not here unwritten; codes of [e, H, M]."""
    y_pH = h_pM.new_empty(groups.n_pairs, codes.shape[1])
    _multiply(h_pM, codes, scale, groups, tile, y_pH, gated=False)
    return y_pH


def _multiply(
    x: Tensor, codes: Tensor, scale: Tensor, groups: Groups, tile: FewTile, out: Tensor, *, gated: bool
) -> None:
    n_blocks, pdl = groups.max_blocks(tile.bm), overlaps(x.device)
    if n_blocks:
        _experts_kernel[(n_blocks * triton.cdiv(out.shape[1], tile.bn),)](
            x, codes, scale, groups.expert_tk, groups.pair_p, groups.offset_g, out, n_blocks, groups.n_local,
            groups.n_shared, groups.expert_tk.shape[1], triton.next_power_of_2(codes.shape[0]), x.shape[1],
            out.shape[1], gated, groups.pair_p is None, codes.dtype == torch.uint8, tile.bm, tile.bn, tile.bk,
            INT4_GROUP, pdl, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip


@triton.jit
def _product(
    codes_ptr, scale_ptr, w_row, w_exists, x_row, x_exists, WIDTH: tl.constexpr, INT4: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, BM]: weight rows `w_row` (int64) times the rows of WIDTH activations that `x_row` points to."""
    out = tl.zeros((ROWS, BM), tl.float32)
    if INT4:
        N_GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
        HALF: tl.constexpr = GROUP // 2
        c = tl.arange(0, HALF)
        code_row = codes_ptr + w_row[:, None] * (N_GROUPS * HALF)
        for g in range(N_GROUPS):
            both = tl.load(code_row + g * HALF + c, mask=w_exists[:, None], other=0)
            at = g * GROUP + c
            low = tl.load(x_row[:, None] + at, mask=x_exists[:, None] & (at < WIDTH), other=0.0)
            high = tl.load(x_row[:, None] + at + HALF, mask=x_exists[:, None] & (at + HALF < WIDTH), other=0.0)
            scale = tl.load(scale_ptr + w_row * N_GROUPS + g, mask=w_exists, other=0.0).to(tl.float32)
            w_low = ((both & 15).to(tl.int8) - 8).to(low.dtype)
            w_high = ((both >> 4).to(tl.int8) - 8).to(low.dtype)
            part = tl.dot(w_low, low.T, input_precision="ieee")
            part = tl.dot(w_high, high.T, part, input_precision="ieee")
            out += part * scale[:, None]
    else:
        for k in range(0, WIDTH, BK):
            at = k + tl.arange(0, BK)
            code = tl.load(codes_ptr + w_row[:, None] * WIDTH + at, mask=w_exists[:, None] & (at < WIDTH), other=0)
            x = tl.load(x_row[:, None] + at, mask=x_exists[:, None] & (at < WIDTH), other=0.0)
            out = tl.dot(code.to(x.dtype), x.T, out, input_precision="ieee")
        out = out * tl.load(scale_ptr + w_row, mask=w_exists, other=0.0)[:, None]
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _linear_kernel(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, n_rows, WIDTH: tl.constexpr, N_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, INT4: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    n_blocks = (n_rows + BM - 1) // BM
    column = (tl.program_id(0) // n_blocks) * BN + tl.arange(0, BN)
    row = (tl.program_id(0) % n_blocks) * BM + tl.arange(0, BM)
    x_row = x_ptr + row.to(tl.int64) * WIDTH
    y = _product(
        codes_ptr, scale_ptr, column.to(tl.int64), column < N_OUT, x_row, row < n_rows, WIDTH, INT4, BN, BM, BK, GROUP
    )
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < N_OUT, other=0.0).to(tl.float32)[:, None]
    place = y_ptr + row.to(tl.int64)[:, None] * N_OUT + column
    tl.store(place, y.T.to(y_ptr.dtype.element_ty), mask=(row < n_rows)[:, None] & (column < N_OUT))


@triton.jit(do_not_specialize=["n_blocks"])
def _experts_kernel(
    x_ptr, codes_ptr, scale_ptr, expert_ptr, pair_ptr, offset_ptr, out_ptr, n_blocks, N_LOCAL: tl.constexpr,
    N_SHARED: tl.constexpr, K: tl.constexpr, BG: tl.constexpr, WIDTH: tl.constexpr, N_OUT: tl.constexpr,
    GATED: tl.constexpr, DIRECT: tl.constexpr, INT4: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    n = (tl.program_id(0) // n_blocks) * BN
    group, first, stop = block_of(
        expert_ptr, offset_ptr, tl.program_id(0) % n_blocks, N_LOCAL, N_SHARED, K, BG, DIRECT, BM
    )
    if group >= N_LOCAL + N_SHARED:
        return
    row = first + tl.arange(0, BM)
    exists = row < stop
    if DIRECT:
        pair = row
    else:
        pair = tl.load(pair_ptr + row, mask=exists, other=0)
    column = n + tl.arange(0, BN)
    if GATED:  # BN gate rows and their up rows in one product
        part = tl.arange(0, 2 * BN)
        w_column = n + part % BN
        w_row = tl.cast(group, tl.int64) * 2 * N_OUT + part // BN * N_OUT + w_column
        x_row = x_ptr + (pair // (K + N_SHARED)).to(tl.int64) * WIDTH
        both = _product(
            codes_ptr, scale_ptr, w_row, w_column < N_OUT, x_row, exists, WIDTH, INT4, 2 * BN, BM, BK, GROUP
        )
        gate, up = both.reshape(2, BN, BM).permute(1, 2, 0).split()
        out = gate * tl.sigmoid(gate) * up
        place = out_ptr + row.to(tl.int64)[:, None] * N_OUT + column
    else:
        w_row = tl.cast(group, tl.int64) * N_OUT + column
        x_row = x_ptr + row.to(tl.int64) * WIDTH
        out = _product(codes_ptr, scale_ptr, w_row, column < N_OUT, x_row, exists, WIDTH, INT4, BN, BM, BK, GROUP)
        place = out_ptr + pair.to(tl.int64)[:, None] * N_OUT + column
    tl.store(place, out.T.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (column < N_OUT))
