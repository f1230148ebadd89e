"""Grouped matmuls of a decode step: few rows per expert, so the time is that of reading the weights once.

One program multiplies at most BM rows of one expert with BN output columns over the whole depth; programs are
numbered so that those which share weights run side by side and find them in L2. The grid covers the worst routing,
since its size must not depend on the data (no host synchronisation, CUDA graphs); programs without rows end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeploy.kernels.moe_rows import group_of
from fastdeploy.kernels.overlap import await_previous, overlaps


@dataclass(frozen=True, slots=True, kw_only=True)
class FewTile:
    """How one decode matmul is cut: rows, output columns and depth of a tile, pipeline depth, warps."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong to which expert. Without `pair_p` every pair is a block of its own (a handful of tokens)."""

    expert_tk: Tensor
    n_local: int
    n_shared: int
    pair_p: Tensor | None
    offset_g: Tensor | None

    @property
    def n_slots(self) -> int:
        """Slots of one token, shared ones included."""
        return self.expert_tk.shape[1] + self.n_shared

    @property
    def n_pairs(self) -> int:
        """Slots of all tokens."""
        return self.expert_tk.shape[0] * self.n_slots

    def max_blocks(self, block_m: int) -> int:
        """The most blocks of `block_m` rows that any routing needs."""
        if self.pair_p is None:
            return self.n_pairs
        n_tokens, k = self.expert_tk.shape
        n_routed = min(n_tokens * k, self.n_local + n_tokens * k // block_m)
        return n_routed + self.n_shared * -(-n_tokens // block_m)


def gate_up_few(x_tH: Tensor, gate_up_eXH: Tensor, groups: Groups, tile: FewTile) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) of each sorted pair, [p, M]; X = 2M, gate rows first.

    Rows of experts that are not here are not written.
    """
    n_groups, n_rows, hidden_size = gate_up_eXH.shape
    h_pM = x_tH.new_empty(groups.n_pairs, n_rows // 2)
    n_blocks, pdl = groups.max_blocks(tile.bm), overlaps(x_tH.device) and groups.pair_p is not None
    if n_blocks:
        w = TensorDescriptor.from_tensor(gate_up_eXH.view(-1, hidden_size), [tile.bn, tile.bk])
        grid = (n_blocks * triton.cdiv(n_rows // 2, tile.bn),)
        _gate_up_kernel[grid](
            x_tH, w, groups.expert_tk, groups.pair_p, groups.offset_g, h_pM, n_blocks,
            groups.n_local, groups.n_shared, groups.expert_tk.shape[1], triton.next_power_of_2(n_groups), n_rows // 2,
            hidden_size, groups.pair_p is None, tile.bm, tile.bn, tile.bk, pdl,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
    return h_pM


def down_few(h_pM: Tensor, down_eHM: Tensor, groups: Groups, tile: FewTile) -> Tensor:
    """h @ down.T of each pair, [p, H], back in the order of pairs, those not here unwritten."""
    n_groups, hidden_size, width = down_eHM.shape
    y_pH = h_pM.new_empty(groups.n_pairs, hidden_size)
    n_blocks, pdl = groups.max_blocks(tile.bm), overlaps(h_pM.device) and groups.pair_p is not None
    if n_blocks:
        w = TensorDescriptor.from_tensor(down_eHM.view(-1, width), [tile.bn, tile.bk])
        grid = (n_blocks * triton.cdiv(hidden_size, tile.bn),)
        _down_kernel[grid](
            h_pM, w, groups.expert_tk, groups.pair_p, groups.offset_g, y_pH,
            n_blocks, groups.n_local, groups.n_shared, groups.expert_tk.shape[1], triton.next_power_of_2(n_groups),
            width, hidden_size, groups.pair_p is None, tile.bm, tile.bn, tile.bk, pdl,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
    return y_pH


@triton.jit
def find_block(offset_ptr, block, N_GROUPS: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr):
    """Group, first row and end row of a block of BM rows; the group is N_GROUPS or more when there is no such block."""
    g = tl.arange(0, BG)
    start = tl.load(offset_ptr + g, mask=g < N_GROUPS, other=0)
    stop = tl.load(offset_ptr + g + 1, mask=g < N_GROUPS, other=0)
    n_blocks = (stop - start + BM - 1) // BM
    group = tl.sum((tl.cumsum(n_blocks, 0) <= block).to(tl.int32), 0)
    mine = g == group
    first_block = tl.sum(tl.where(g < group, n_blocks, 0), 0)
    first_row = tl.sum(tl.where(mine, start, 0), 0) + (block - first_block) * BM
    return group, first_row, tl.sum(tl.where(mine, stop, 0), 0)


@triton.jit
def block_of(
    expert_ptr, offset_ptr, block, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr, K: tl.constexpr, BG: tl.constexpr,
    DIRECT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    if DIRECT:
        place = group_of(expert_ptr, block, block >= 0, N_LOCAL, N_SHARED, K), block, block + 1
    else:
        place = find_block(offset_ptr, block, N_LOCAL + N_SHARED, BG, BM)
    return place


@triton.jit(do_not_specialize=["n_blocks"])
def _gate_up_kernel(
    x_ptr, w, expert_ptr, pair_ptr, offset_ptr, h_ptr, n_blocks, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr,
    K: tl.constexpr, BG: tl.constexpr, M: tl.constexpr, H: tl.constexpr, DIRECT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
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
    x_row = x_ptr + (pair // (K + N_SHARED)).to(tl.int64)[:, None] * H
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, H, BK):
        c = k + tl.arange(0, BK)
        x = tl.load(x_row + c, mask=(row < stop)[:, None] & (c < H), other=0.0)
        gate = tl.dot(x, w.load([group * 2 * M + n, k]).T, gate, input_precision="ieee")
        up = tl.dot(x, w.load([group * 2 * M + M + n, k]).T, up, input_precision="ieee")
    h = gate * tl.sigmoid(gate) * up
    m = n + tl.arange(0, BN)
    tl.store(h_ptr + row.to(tl.int64)[:, None] * M + m, h, mask=(row < stop)[:, None] & (m < M))


@triton.jit(do_not_specialize=["n_blocks"])
def _down_kernel(
    h_ptr, w, expert_ptr, pair_ptr, offset_ptr, y_ptr, n_blocks, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr,
    K: tl.constexpr, BG: tl.constexpr, M: tl.constexpr, H: tl.constexpr, DIRECT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
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
    y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, M, BK):
        c = k + tl.arange(0, BK)
        h = tl.load(h_row + c, mask=(row < stop)[:, None] & (c < M), other=0.0)
        y = tl.dot(h, w.load([group * H + n, k]).T, y, input_precision="ieee")
    column = n + tl.arange(0, BN)
    place = pair.to(tl.int64)[:, None] * H + column
    tl.store(y_ptr + place, y, mask=(row < stop)[:, None] & (column < H))
