"""Grouped matmuls of a decode step with block-wise FP8 weights and activations: half the bytes of `moe_few`.

The weights are the left operand, so that the tensor cores' wide side holds weights and not the padding of few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeploy.kernels.moe_few import FewTile, Groups, block_of
from fastdeploy.kernels.overlap import await_previous, overlaps
from fastdeploy.kernels.quantize import to_fp8
from fastdeploy.kernels.weight_formats import FP8_BLOCK


def gate_up_few_fp8(
    x_tH: Tensor, x_scale_bt: Tensor, gate_up_eXH: Tensor, w_scale_ecb: Tensor, groups: Groups, tile: FewTile
) -> tuple[Tensor, Tensor]:
    """silu(x @ gate.T) * (x @ up.T) of each sorted pair: FP8 codes [p, M] and scales [M / 128, p]; X = 2M, gate first.

    All operands FP8, `x_scale_bt` [H / 128, t], `w_scale_ecb` [e, X / 128, H / 128]; `tile.bn` and `tile.bk` are 128.
    Rows of experts that are not here are not written.
    """
    n_groups, n_rows, hidden_size = gate_up_eXH.shape
    width = n_rows // 2
    assert tile.bn == FP8_BLOCK, f"{tile}: a tile must hold whole blocks of 128 columns, whose scale it finds"
    _check(tile, width, hidden_size)
    h_pM = torch.empty(groups.n_pairs, width, dtype=torch.float8_e4m3fn, device=x_tH.device)
    h_scale_bp = torch.empty(width // FP8_BLOCK, groups.n_pairs, dtype=torch.float32, device=x_tH.device)
    n_blocks, pdl = groups.max_blocks(tile.bm), overlaps(x_tH.device)
    if n_blocks:
        w = TensorDescriptor.from_tensor(gate_up_eXH.view(-1, hidden_size), [tile.bn, tile.bk])
        _gate_up_kernel[(n_blocks * (width // tile.bn),)](
            x_tH, x_scale_bt, w, w_scale_ecb, groups.expert_tk, groups.pair_p, groups.offset_g, h_pM, h_scale_bp,
            n_blocks, x_tH.shape[0], groups.n_pairs, groups.n_local, groups.n_shared, groups.expert_tk.shape[1],
            triton.next_power_of_2(n_groups), width, hidden_size, groups.pair_p is None, tile.bm, tile.bn, tile.bk, pdl,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
    return h_pM, h_scale_bp


def down_few_fp8(
    h_pM: Tensor, h_scale_bp: Tensor, down_eHM: Tensor, w_scale_ecb: Tensor, groups: Groups, tile: FewTile, like: Tensor
) -> Tensor:
    """h @ down.T of each pair, [p, H] in the dtype of `like`, back in the order of pairs; those not here unwritten."""
    n_groups, hidden_size, width = down_eHM.shape
    _check(tile, hidden_size, width)
    y_pH = like.new_empty(groups.n_pairs, hidden_size)
    n_blocks, pdl = groups.max_blocks(tile.bm), overlaps(h_pM.device)
    if n_blocks:
        w = TensorDescriptor.from_tensor(down_eHM.view(-1, width), [tile.bn, tile.bk])
        _down_kernel[(n_blocks * (hidden_size // tile.bn),)](
            h_pM, h_scale_bp, w, w_scale_ecb, groups.expert_tk, groups.pair_p, groups.offset_g, y_pH, n_blocks,
            groups.n_pairs, groups.n_local, groups.n_shared, groups.expert_tk.shape[1],
            triton.next_power_of_2(n_groups), width, hidden_size, groups.pair_p is None, tile.bm, tile.bn, tile.bk, pdl,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
    return y_pH


def _check(tile: FewTile, n_columns: int, depth: int) -> None:
    assert tile.bk == FP8_BLOCK and FP8_BLOCK % tile.bn == 0, f"{tile} does not fit FP8 blocks of {FP8_BLOCK}"
    assert n_columns % FP8_BLOCK == 0 and depth % FP8_BLOCK == 0, "block-wise FP8 experts need widths in 128s"


@triton.jit(do_not_specialize=["n_blocks", "n_tokens", "n_pairs"])
def _gate_up_kernel(
    x_ptr, x_scale_ptr, w, w_scale_ptr, expert_ptr, pair_ptr, offset_ptr, h_ptr, h_scale_ptr, n_blocks, n_tokens,
    n_pairs, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr, K: tl.constexpr, BG: tl.constexpr, M: tl.constexpr,
    H: tl.constexpr, DIRECT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    pid = tl.program_id(0)
    n = (pid // n_blocks) * BN
    group, first, stop = block_of(expert_ptr, offset_ptr, pid % n_blocks, N_LOCAL, N_SHARED, K, BG, DIRECT, BM)
    if group >= N_LOCAL + N_SHARED:
        return
    row = first + tl.arange(0, BM)
    if DIRECT:
        pair = row
    else:
        pair = tl.load(pair_ptr + row, mask=row < stop, other=0)
    token = pair // (K + N_SHARED)
    x_row = x_ptr + token.to(tl.int64)[:, None] * H
    gate_scale = w_scale_ptr + (group * 2 * (M // BK) + n // BK) * (H // BK)
    up_scale = gate_scale + (M // BK) * (H // BK)
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in range(0, H, BK):
        x = tl.load(x_row + k + tl.arange(0, BK), mask=(row < stop)[:, None], other=0.0)
        scale = tl.load(x_scale_ptr + (k // BK) * n_tokens + token, mask=row < stop, other=0.0)
        gate_part = tl.dot(w.load([group * 2 * M + n, k]), x.T)
        up_part = tl.dot(w.load([group * 2 * M + M + n, k]), x.T)
        gate += gate_part * (scale * tl.load(gate_scale + k // BK))[None, :]
        up += up_part * (scale * tl.load(up_scale + k // BK))[None, :]
    code, scale = to_fp8((gate * tl.sigmoid(gate) * up).T, BM, BN)
    m = n + tl.arange(0, BN)
    tl.store(h_ptr + row.to(tl.int64)[:, None] * M + m, code, mask=(row < stop)[:, None])
    tl.store(h_scale_ptr + (n // BN) * n_pairs + row, scale, mask=row < stop)


@triton.jit(do_not_specialize=["n_blocks", "n_pairs"])
def _down_kernel(
    h_ptr, h_scale_ptr, w, w_scale_ptr, expert_ptr, pair_ptr, offset_ptr, y_ptr, n_blocks, n_pairs,
    N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr, K: tl.constexpr, BG: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    DIRECT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    pid = tl.program_id(0)
    n = (pid // n_blocks) * BN
    group, first, stop = block_of(expert_ptr, offset_ptr, pid % n_blocks, N_LOCAL, N_SHARED, K, BG, DIRECT, BM)
    if group >= N_LOCAL + N_SHARED:
        return
    row = first + tl.arange(0, BM)
    if DIRECT:
        pair = row
    else:
        pair = tl.load(pair_ptr + row, mask=row < stop, other=0)
    h_row = h_ptr + row.to(tl.int64)[:, None] * M
    w_scale = w_scale_ptr + (group * (H // BK) + n // BK) * (M // BK)
    y = tl.zeros((BN, BM), tl.float32)
    for k in range(0, M, BK):
        h = tl.load(h_row + k + tl.arange(0, BK), mask=(row < stop)[:, None], other=0.0)
        scale = tl.load(h_scale_ptr + (k // BK) * n_pairs + row, mask=row < stop, other=0.0)
        y += tl.dot(w.load([group * H + n, k]), h.T) * (scale * tl.load(w_scale + k // BK))[None, :]
    place = pair.to(tl.int64)[:, None] * H + n + tl.arange(0, BN)
    tl.store(y_ptr + place, y.T, mask=(row < stop)[:, None])
