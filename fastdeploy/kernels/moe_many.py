"""Grouped matmuls of prefill: many rows per expert, so the time is that of the tensor cores.

A program per multiprocessor walks over the tiles of all experts. Rows lie sorted by expert without gaps; a tile that
reaches over the end of its expert computes the surplus rows and does not store them.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyTile:
    """How one prefill matmul is cut: rows, output columns and depth of a tile, pipeline depth, warps.

    `bn` counts the columns of one product; gate and up together have 2 * bn. `flatten` lets the next tile's loads
    start while this one is stored. `per_sm`: programs on one multiprocessor.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    flatten: bool = True
    per_sm: int = 1


def gate_up_many(x_pH: Tensor, gate_up_eXH: Tensor, offset_g: Tensor, tile: ManyTile, n_sms: int) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) of sorted rows, [p, M]; X = 2M, gate rows first.

    `offset_g` int32 [groups + 1]: group g owns rows offset_g[g]..offset_g[g + 1]; rows behind the last are not written.
    """
    n_groups, n_rows, hidden_size = gate_up_eXH.shape
    h_pM = x_pH.new_empty(x_pH.shape[0], n_rows // 2)
    if x_pH.shape[0]:
        _gate_up_kernel[(n_sms * tile.per_sm,)](
            TensorDescriptor.from_tensor(x_pH, [tile.bm, tile.bk]),
            TensorDescriptor.from_tensor(gate_up_eXH.view(2 * n_groups, -1, hidden_size), [2, tile.bn, tile.bk]),
            offset_g, h_pM, n_groups, triton.next_power_of_2(n_groups), n_rows // 2, hidden_size,
            n_sms * tile.per_sm, tile.flatten, tile.bm, tile.bn, tile.bk, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return h_pM


def down_many(h_pM: Tensor, down_eHM: Tensor, pair_p: Tensor, offset_g: Tensor, tile: ManyTile, n_sms: int) -> Tensor:
    """h @ down.T of sorted rows, [p, H]; row i goes to row pair_p[i] of the result."""
    n_groups, hidden_size, width = down_eHM.shape
    y_pH = h_pM.new_empty(h_pM.shape[0], hidden_size)
    if h_pM.shape[0]:
        _down_kernel[(n_sms * tile.per_sm,)](
            TensorDescriptor.from_tensor(h_pM, [tile.bm, tile.bk]),
            TensorDescriptor.from_tensor(down_eHM.view(-1, width), [tile.bn, tile.bk]),
            pair_p, offset_g, y_pH, n_groups, triton.next_power_of_2(n_groups), width, hidden_size,
            n_sms * tile.per_sm, tile.flatten, tile.bm, tile.bn, tile.bk, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y_pH


@triton.jit
def count_tiles(offset_ptr, N_GROUPS: tl.constexpr, BG: tl.constexpr, N_COLUMNS: tl.constexpr, BM: tl.constexpr):
    """Tiles of all groups together, N_COLUMNS for every BM rows begun."""
    g = tl.arange(0, BG)
    start = tl.load(offset_ptr + g, mask=g < N_GROUPS, other=0)
    stop = tl.load(offset_ptr + g + 1, mask=g < N_GROUPS, other=0)
    return tl.sum((stop - start + BM - 1) // BM, 0) * N_COLUMNS


@triton.jit
def find_tile(
    offset_ptr, tile, N_GROUPS: tl.constexpr, BG: tl.constexpr, N_COLUMNS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Group, first row, end row and column block of a tile. Within a group, tiles that share weights are neighbours."""
    g = tl.arange(0, BG)
    start = tl.load(offset_ptr + g, mask=g < N_GROUPS, other=0)
    stop = tl.load(offset_ptr + g + 1, mask=g < N_GROUPS, other=0)
    n_blocks = (stop - start + BM - 1) // BM
    group = tl.sum((tl.cumsum(n_blocks, 0) * N_COLUMNS <= tile).to(tl.int32), 0)
    mine = g == group
    local = tile - tl.sum(tl.where(g < group, n_blocks, 0), 0) * N_COLUMNS
    n_mine = tl.maximum(tl.sum(tl.where(mine, n_blocks, 0), 0), 1)
    first = tl.sum(tl.where(mine, start, 0), 0) + (local % n_mine) * BM
    return group, first, tl.sum(tl.where(mine, stop, 0), 0), local // n_mine


@triton.jit
def _gate_up_kernel(
    x_desc, w_desc, offset_ptr, h_ptr, N_GROUPS: tl.constexpr, BG: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    N_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    N_COLUMNS: tl.constexpr = (M + BN - 1) // BN
    n_tiles = count_tiles(offset_ptr, N_GROUPS, BG, N_COLUMNS, BM)
    for tile in tl.range(tl.program_id(0), n_tiles, N_PROGRAMS, flatten=FLATTEN):
        group, first, stop, column = find_tile(offset_ptr, tile, N_GROUPS, BG, N_COLUMNS, BM)
        both = tl.zeros((BM, 2 * BN), tl.float32)  # one box of the copy engine holds BN gate rows and their up rows
        for k in range(0, H, BK):
            w = w_desc.load([group * 2, column * BN, k]).reshape(2 * BN, BK)
            both = tl.dot(x_desc.load([first, k]), w.T, both, input_precision="ieee")
        gate, up = both.reshape(BM, 2, BN).permute(0, 2, 1).split()
        h = gate * tl.sigmoid(gate) * up
        row = first + tl.arange(0, BM)
        m = column * BN + tl.arange(0, BN)
        tl.store(
            h_ptr + row.to(tl.int64)[:, None] * M + m, h.to(h_ptr.dtype.element_ty),
            mask=(row < stop)[:, None] & (m < M),
        )  # fmt: skip


@triton.jit
def _down_kernel(
    h_desc, w_desc, pair_ptr, offset_ptr, y_ptr, N_GROUPS: tl.constexpr, BG: tl.constexpr, M: tl.constexpr,
    H: tl.constexpr, N_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    N_COLUMNS: tl.constexpr = (H + BN - 1) // BN
    n_tiles = count_tiles(offset_ptr, N_GROUPS, BG, N_COLUMNS, BM)
    for tile in tl.range(tl.program_id(0), n_tiles, N_PROGRAMS, flatten=FLATTEN):
        group, first, stop, column = find_tile(offset_ptr, tile, N_GROUPS, BG, N_COLUMNS, BM)
        y = tl.zeros((BM, BN), tl.float32)
        for k in range(0, M, BK):
            y = tl.dot(h_desc.load([first, k]), w_desc.load([group * H + column * BN, k]).T, y, input_precision="ieee")
        row = first + tl.arange(0, BM)
        out = column * BN + tl.arange(0, BN)
        pair = tl.load(pair_ptr + row, mask=row < stop, other=0)
        tl.store(
            y_ptr + pair.to(tl.int64)[:, None] * H + out, y.to(y_ptr.dtype.element_ty),
            mask=(row < stop)[:, None] & (out < H),
        )  # fmt: skip
