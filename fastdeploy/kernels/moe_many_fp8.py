"""Grouped matmuls of prefill in block-wise FP8, on Hopper, with warps that have one job each.

One warp fetches tiles with the copy engine, two groups of four warps multiply 64 rows each. While one group scales,
activates or stores, the other keeps the tensor cores busy, and fetching never stops. Written in Gluon, Triton's lower
level: its compiler does not divide the work of warps on Hopper by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastdeploy.kernels.moe_many import count_tiles, find_tile
from fastdeploy.kernels.weight_formats import FP8_BLOCK

_ROWS = 128  # rows of a tile; it has twice as many output columns, in two halves
_STAGES = 4
_N_WARPS = 4  # of the first multiplying group


def fits_hopper(device: torch.device, hidden_size: int, width: int) -> bool:
    """Whether the kernels here can run experts of this shape on this device."""
    return torch.cuda.get_device_capability(device)[0] == 9 and not hidden_size % (2 * _ROWS) and not width % _ROWS


def gate_up_many_fp8(
    x_pH: Tensor, x_scale_bt: Tensor, gate_up_eXH: Tensor, w_scale_ecb: Tensor, pair_p: Tensor, offset_g: Tensor,
    n_slots: int, n_sms: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """silu(x @ gate.T) * (x @ up.T) of sorted rows: FP8 codes [p, M] and scales [M / 128, p]; X = 2M, gate rows first.

    `x_pH` FP8, its row i with the scales of token pair_p[i] // n_slots in `x_scale_bt` [H / 128, t]; `gate_up_eXH` FP8
    with scales [e, X / 128, H / 128]. Rows behind the last offset are not written.
    """
    n_rows, width, hidden_size = pair_p.numel(), gate_up_eXH.shape[1] // 2, gate_up_eXH.shape[2]
    h_pM = torch.empty(n_rows, width, dtype=torch.float8_e4m3fn, device=x_pH.device)
    h_scale_bp = torch.empty(width // FP8_BLOCK, n_rows, dtype=torch.float32, device=x_pH.device)
    if n_rows:
        tile_i4, n_tiles_1 = _list_tiles(offset_g, n_rows, width // _ROWS)
        _matmul[(n_sms,)](
            _descriptor(x_pH), _descriptor(gate_up_eXH.view(-1, hidden_size)), tile_i4, n_tiles_1, x_scale_bt,
            w_scale_ecb, pair_p, h_pM, h_scale_bp, x_scale_bt.shape[1], n_rows, n_slots, 2 * width, _ROWS, width,
            hidden_size // FP8_BLOCK, width, True, _STAGES, n_sms, num_warps=_N_WARPS,
        )  # fmt: skip
    return h_pM, h_scale_bp


def down_many_fp8(
    h_pM: Tensor, h_scale_bp: Tensor, down_eHM: Tensor, w_scale_ecb: Tensor, pair_p: Tensor, offset_g: Tensor,
    n_sms: int,
) -> Tensor:  # fmt: skip
    """h @ down.T of sorted rows, bf16 [p, H]; row i goes to row pair_p[i] of it. FP8 operands as above."""
    n_rows, hidden_size, width = pair_p.numel(), down_eHM.shape[1], down_eHM.shape[2]
    y_pH = torch.empty(n_rows, hidden_size, dtype=torch.bfloat16, device=h_pM.device)
    if n_rows:
        tile_i4, n_tiles_1 = _list_tiles(offset_g, n_rows, hidden_size // (2 * _ROWS))
        _matmul[(n_sms,)](
            _descriptor(h_pM), _descriptor(down_eHM.view(-1, width)), tile_i4, n_tiles_1, h_scale_bp, w_scale_ecb,
            pair_p, y_pH, y_pH, n_rows, n_rows, 1, hidden_size, 2 * _ROWS, _ROWS, width // FP8_BLOCK, hidden_size,
            False, _STAGES, n_sms, num_warps=_N_WARPS,
        )  # fmt: skip
    return y_pH


def _descriptor(x_rk: Tensor) -> TensorDescriptor:
    """For boxes of 128 rows by 128 codes."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(x_rk, [_ROWS, FP8_BLOCK], layout)


def _list_tiles(offset_g: Tensor, n_rows: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """Group, first row, end row and column block of every tile [i, 4], and how many there are [1]."""
    n_groups = offset_g.numel() - 1
    n_max = (n_rows // _ROWS + n_groups) * n_columns
    numbers = torch.empty(n_max * 4 + 4, dtype=torch.int32, device=offset_g.device)
    tile_i4, n_tiles_1 = numbers[: n_max * 4], numbers[n_max * 4 :]
    _list_kernel[(n_max,)](
        offset_g, tile_i4, n_tiles_1, n_groups, triton.next_power_of_2(n_groups), n_columns, _ROWS, num_warps=1
    )
    return tile_i4, n_tiles_1


@triton.jit
def _list_kernel(
    offset_ptr, tile_ptr, count_ptr, N_GROUPS: tl.constexpr, BG: tl.constexpr, N_COLUMNS: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n_tiles = count_tiles(offset_ptr, N_GROUPS, BG, N_COLUMNS, BM)
    if tile == 0:
        tl.store(count_ptr, n_tiles)
    if tile < n_tiles:
        group, first, stop, column = find_tile(offset_ptr, tile, N_GROUPS, BG, N_COLUMNS, BM)
        tl.store(tile_ptr + tile * 4, group)
        tl.store(tile_ptr + tile * 4 + 1, first)
        tl.store(tile_ptr + tile * 4 + 2, stop)
        tl.store(tile_ptr + tile * 4 + 3, column)


# In the kernels below a group's weights are GROUP_ROWS rows; a tile's two halves begin at row column * STEP and SECOND
# rows further on: a gate and its up rows, or two neighbouring blocks of down rows.


@gluon.jit
def _fetch(
    a_desc, w_desc, a_bufs, w_bufs, full, empty, tile_ptr, count_ptr, GROUP_ROWS: gl.constexpr, STEP: gl.constexpr,
    SECOND: gl.constexpr, N_BLOCKS: gl.constexpr, STAGES: gl.constexpr, N_PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The fetching warp: fills slots of the ring in turn, each as soon as both multiplying groups have let go of it."""
    BK: gl.constexpr = a_desc.block_type.shape[1]
    n_tiles = gl.load(count_ptr)
    turn = 0
    for tile in range(gl.program_id(0), n_tiles, N_PROGRAMS):
        first = gl.load(tile_ptr + tile * 4 + 1)
        w_row = gl.load(tile_ptr + tile * 4) * GROUP_ROWS + gl.load(tile_ptr + tile * 4 + 3) * STEP
        for k in range(N_BLOCKS):
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, 3 * 128 * 128)
            tma.async_copy_global_to_shared(a_desc, [first, k * BK], bar, a_bufs.index(slot))
            tma.async_copy_global_to_shared(w_desc, [w_row, k * BK], bar, w_bufs.index(2 * slot))
            tma.async_copy_global_to_shared(w_desc, [w_row + SECOND, k * BK], bar, w_bufs.index(2 * slot + 1))
            turn += 1


@gluon.jit
def _store_rows(acc, out_ptr, place, row, stop, column):
    """Store rows of 128 columns as bf16; `row` [64] and where each begins in the result, `place` [64]."""
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    c = column + gl.arange(0, 128, layout=gl.SliceLayout(0, flat))
    at = out_ptr + gl.expand_dims(place, 1) + gl.expand_dims(c, 0)
    gl.store(at, gl.convert_layout(acc.to(gl.bfloat16), flat), mask=gl.expand_dims(row < stop, 1))


@gluon.jit
def _multiply(
    HALF: gl.constexpr, a_bufs, w_bufs, full, empty, tile_ptr, count_ptr, a_scale_ptr, w_scale_ptr, pair_ptr, out_ptr,
    out_scale_ptr, n_scales, n_rows, N_SLOTS: gl.constexpr, GROUP_ROWS: gl.constexpr, STEP: gl.constexpr,
    SECOND: gl.constexpr, N_BLOCKS: gl.constexpr, WIDTH: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
    N_PROGRAMS: gl.constexpr,
):  # fmt: skip
    """A multiplying group: rows HALF * 64 to HALF * 64 + 63 of every tile.

    Products of one 128-deep block are scaled and added in float32, as the accumulators of FP8 tensor cores are too
    short for more and the scales change there anyway.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    flat8: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    zero = gl.zeros((64, 128), gl.float32, mma)
    n_tiles = gl.load(count_ptr)
    turn = 0
    for tile in range(gl.program_id(0), n_tiles, N_PROGRAMS):
        w_row = gl.load(tile_ptr + tile * 4) * GROUP_ROWS
        first = gl.load(tile_ptr + tile * 4 + 1) + HALF * 64
        stop = gl.load(tile_ptr + tile * 4 + 2)
        column = gl.load(tile_ptr + tile * 4 + 3)
        row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        if GATED:
            a_scale_row = a_scale_ptr + gl.load(pair_ptr + row, mask=row < stop, other=0) // N_SLOTS
        else:
            a_scale_row = a_scale_ptr + gl.minimum(row, n_rows - 1)
        scale0_ptr = w_scale_ptr + ((w_row + column * STEP) // 128) * N_BLOCKS
        scale1_ptr = w_scale_ptr + ((w_row + column * STEP + SECOND) // 128) * N_BLOCKS
        acc0 = gl.zeros((64, 128), gl.float32, mma)
        acc1 = gl.zeros((64, 128), gl.float32, mma)
        a_scale, scale0, scale1 = gl.load(a_scale_row), gl.load(scale0_ptr), gl.load(scale1_ptr)
        for k in range(N_BLOCKS):
            # The next block's scales travel while this block is multiplied: nothing else hides their latency.
            ahead = gl.minimum(k + 1, N_BLOCKS - 1)
            next_a = gl.load(a_scale_row + ahead * n_scales)
            next0, next1 = gl.load(scale0_ptr + ahead), gl.load(scale1_ptr + ahead)
            slot = turn % STAGES
            mbarrier.wait(full.index(slot), (turn // STAGES) & 1)
            a = a_bufs.index(slot).slice(HALF * 64, 64, 0)
            part = warpgroup_mma(a, w_bufs.index(2 * slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            acc0 += part * gl.expand_dims(a_scale * scale0, 1)
            part = warpgroup_mma(a, w_bufs.index(2 * slot + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(slot), count=1)
            acc1 += part * gl.expand_dims(a_scale * scale1, 1)
            a_scale, scale0, scale1 = next_a, next0, next1
            turn += 1
        if GATED:
            h = acc0 / (1.0 + gl.exp(-acc0)) * acc1
            scale = gl.maximum(gl.max(gl.abs(h), 1) / 448.0, 1e-12)
            gl.store(out_scale_ptr + column * n_rows + row, scale, mask=row < stop)
            code = gl.convert_layout((h / gl.expand_dims(scale, 1)).to(gl.float8e4nv), flat8)
            row8 = first + gl.arange(0, 64, layout=gl.SliceLayout(1, flat8))
            c = column * STEP + gl.arange(0, 128, layout=gl.SliceLayout(0, flat8))
            at = out_ptr + gl.expand_dims(row8.to(gl.int64) * WIDTH, 1) + gl.expand_dims(c, 0)
            gl.store(at, code, mask=gl.expand_dims(row8 < stop, 1))
        else:
            flat_row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
            place = gl.load(pair_ptr + flat_row, mask=flat_row < stop, other=0).to(gl.int64) * WIDTH
            _store_rows(acc0, out_ptr, place, flat_row, stop, column * STEP)
            _store_rows(acc1, out_ptr, place, flat_row, stop, column * STEP + SECOND)


@gluon.jit(do_not_specialize=["n_scales", "n_rows"])
def _matmul(
    a_desc, w_desc, tile_ptr, count_ptr, a_scale_ptr, w_scale_ptr, pair_ptr, out_ptr, out_scale_ptr, n_scales, n_rows,
    N_SLOTS: gl.constexpr, GROUP_ROWS: gl.constexpr, STEP: gl.constexpr, SECOND: gl.constexpr, N_BLOCKS: gl.constexpr,
    WIDTH: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr, N_PROGRAMS: gl.constexpr,
):  # fmt: skip
    BK: gl.constexpr = a_desc.block_type.shape[1]
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 128, BK], a_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 128, BK], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # one arrival of each multiplying group
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, a_bufs, w_bufs, full, empty, tile_ptr, count_ptr,
                    a_scale_ptr, w_scale_ptr, pair_ptr, out_ptr, out_scale_ptr, n_scales, n_rows,
                    N_SLOTS, GROUP_ROWS, STEP, SECOND, N_BLOCKS, WIDTH, GATED, STAGES, N_PROGRAMS,
                ),
            ),
            (
                _multiply,
                (
                    1, a_bufs, w_bufs, full, empty, tile_ptr, count_ptr,
                    a_scale_ptr, w_scale_ptr, pair_ptr, out_ptr, out_scale_ptr, n_scales, n_rows,
                    N_SLOTS, GROUP_ROWS, STEP, SECOND, N_BLOCKS, WIDTH, GATED, STAGES, N_PROGRAMS,
                ),
            ),
            (
                _fetch,
                (
                    a_desc, w_desc, a_bufs, w_bufs, full, empty, tile_ptr, count_ptr,
                    GROUP_ROWS, STEP, SECOND, N_BLOCKS, STAGES, N_PROGRAMS,
                ),
            ),
        ],
        [4, 1],  # warps and registers of the second multiplying group and of the fetching warp
        [232, 24],
    )  # fmt: skip
