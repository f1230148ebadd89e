"""Rows to the ranks of their experts and back, written straight into the memory of the other GPUs.

Each direction is one kernel: its programs write rows into the memory of every rank, raise a flag there, wait for the
same program of every other rank, and go on. Program i waits for nothing but what programs i of the others do before
they wait, so any number of programs is safe, however few run at a time. All ranks launch the same number.

A flag holds how often its program has been here. Nothing is ever reset, so a captured graph can be replayed, and a
fast rank can raise a flag again before a slow one has looked. Nor do two buffers take turns: a rank writes rows for the
next dispatch only after a combine, in which every other rank said that it was done with the rows of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.moe_rows import SlotOutputs

MAX_PROGRAMS = 1024
SEND, RECEIVE, BOTH = 1, 2, 3  # parts of a kernel; alone they serve tests in one process
_BLOCK = 512
_WARPS = 2
_PATIENCE = 1 << 28  # looks at a flag before a kernel gives up, some minutes
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """Where things lie in the memory of each rank, in bytes from its start; `max_rows` of all ranks together.

    flag: int32 [2, rank, MAX_PROGRAMS], of dispatch and combine. span: int32 [rank, 2], where the rows of a rank begin
    and how many there are. expert int32 [r, k], weight float32 [r, k], x [r, H]: what all ranks sent, in their order.
    back [row, rank, H]: what each rank's experts made of this rank's rows.
    """

    size: int
    max_rows: int
    n_experts: int
    k: int
    hidden_size: int
    itemsize: int

    @property
    def span_at(self) -> int:
        return _aligned(4 * 2 * self.size * MAX_PROGRAMS)

    @property
    def expert_at(self) -> int:
        return self.span_at + _aligned(4 * 2 * self.size)

    @property
    def weight_at(self) -> int:
        return self.expert_at + _aligned(4 * self.max_rows * self.k)

    @property
    def x_at(self) -> int:
        return self.weight_at + _aligned(4 * self.max_rows * self.k)

    @property
    def back_at(self) -> int:
        return self.x_at + _aligned(self.max_rows * self.hidden_size * self.itemsize)

    @property
    def n_bytes(self) -> int:
        return self.back_at + self.max_rows * self.size * self.hidden_size * self.itemsize


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class PeerView:
    """What a rank knows: its number, where it sees the memory of each, and how often its programs have been here.

    address_g: int64 [size]. local_id_ge: int32 [size, n_experts + 1], from an expert's number to that on each rank,
    which is the rank's number of experts for one elsewhere and in the last column. epoch_p: int32 [2, MAX_PROGRAMS],
    zero at first.
    """

    layout: PeerLayout
    rank: int
    address_g: Tensor
    local_id_ge: Tensor
    epoch_p: Tensor


def dispatch_ref(
    x_gtH: Sequence[Tensor], expert_gtk: Sequence[Tensor], weight_gtk: Sequence[Tensor], local_id_e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, local experts, weights) that a rank with the table `local_id_e` gets from what all ranks send."""
    return torch.cat(tuple(x_gtH)), local_id_e[torch.cat(tuple(expert_gtk)).long()], torch.cat(tuple(weight_gtk))


def combine_ref(y_grH: Sequence[Tensor], first: int, n_rows: int) -> Tensor:
    """What a rank with the rows from `first` on gets: sums over all ranks, in their order and in float32."""
    total_tH = torch.zeros_like(y_grH[0][first : first + n_rows], dtype=torch.float32)
    for y_rH in y_grH:
        total_tH += y_rH[first : first + n_rows].float()
    return total_tH.to(y_grH[0].dtype)


def dispatch_rows(
    view: PeerView,
    x_tH: Tensor,
    expert_tk: Tensor,
    weight_tk: Tensor,
    n_rows_g: tuple[int, ...],
    *,
    every_row: bool,
    part: int = BOTH,
) -> None:
    """Write this rank's rows to all ranks and wait for theirs.

    A rank none of whose experts a row wants gets its routing alone, unless `every_row`. `expert_tk` any integer type.
    """
    layout, n_most = view.layout, max(n_rows_g)
    _dispatch_kernel[(min(n_most, MAX_PROGRAMS),)](
        x_tH, expert_tk, weight_tk, view.local_id_ge, view.address_g, view.epoch_p, x_tH.shape[0],
        sum(n_rows_g[: view.rank]), view.rank, layout.size, layout.n_experts, layout.k,
        triton.next_power_of_2(layout.k), layout.hidden_size, layout.span_at, layout.expert_at, layout.weight_at,
        layout.x_at, every_row, part, MAX_PROGRAMS, _PATIENCE, _block(layout), num_warps=_WARPS,
    )  # fmt: skip


def combine_rows(view: PeerView, y: SlotOutputs, n_rows_g: tuple[int, ...], *, part: int = BOTH) -> Tensor:
    """Add up each row's slots, send the sums to the ranks of the rows, and add up what all ranks sent here; [t, H]."""
    layout, n_most = view.layout, max(n_rows_g)
    out_tH = y.y_pH.new_empty(n_rows_g[view.rank], layout.hidden_size)
    block = _block(layout)
    n_columns = triton.cdiv(layout.hidden_size, block)
    n_routed = 0 if y.expert_rk is None else y.expert_rk.shape[1]
    _combine_kernel[(min(n_most * n_columns, MAX_PROGRAMS),)](
        y.y_pH, y.expert_rk, y.weight_rk, y.base_rH, out_tH, view.address_g, view.epoch_p, n_most, n_rows_g[view.rank],
        y.n_local, n_routed, y.n_shared, y.base_rH is not None, view.rank, layout.size, layout.hidden_size, n_columns,
        layout.span_at, layout.back_at, part, MAX_PROGRAMS, _PATIENCE, block, num_warps=_WARPS,
    )  # fmt: skip
    return out_tH


def _block(layout: PeerLayout) -> int:
    return min(_BLOCK, int(triton.next_power_of_2(layout.hidden_size)))


@triton.jit
def _signal(address_ptr, place, epoch, RANK: tl.constexpr, SIZE: tl.constexpr, N_FLAGS: tl.constexpr):
    """Raise this program's flag on all other ranks, after what all threads of it have written."""
    tl.debug_barrier()
    for step in tl.static_range(1, SIZE):
        peer = (RANK + step) % SIZE
        flag_ptr = tl.load(address_ptr + peer).to(tl.pointer_type(tl.int32)) + RANK * N_FLAGS + place
        tl.atomic_xchg(flag_ptr, epoch, sem="release", scope="sys")


@triton.jit
def _wait(
    address_ptr, place, epoch, RANK: tl.constexpr, SIZE: tl.constexpr, N_FLAGS: tl.constexpr, PATIENCE: tl.constexpr
):
    """Until this program has been here on all other ranks; what they wrote before can be read then."""
    mine_ptr = tl.load(address_ptr + RANK).to(tl.pointer_type(tl.int32)) + place
    for step in tl.static_range(1, SIZE):
        flag_ptr = mine_ptr + ((RANK + step) % SIZE) * N_FLAGS
        n_looks = 0
        # The difference is right also when the count has gone round.
        while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - epoch < 0:
            n_looks += 1
            if n_looks > PATIENCE:  # the rank is gone: end this one with an error rather than never
                tl.inline_asm_elementwise("trap; mov.u32 $0, $1;", "=r,r", [n_looks], tl.int32, False, 1)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_mine", "first"])
def _dispatch_kernel(
    x_ptr, expert_ptr, weight_ptr, table_ptr, address_ptr, epoch_ptr, n_mine, first, RANK: tl.constexpr,
    SIZE: tl.constexpr, N_EXPERTS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, H: tl.constexpr,
    SPAN_AT: tl.constexpr, EXPERT_AT: tl.constexpr, WEIGHT_AT: tl.constexpr, X_AT: tl.constexpr,
    EVERY_ROW: tl.constexpr, PART: tl.constexpr, N_PLACES: tl.constexpr, PATIENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0)
    epoch = tl.load(epoch_ptr + me) + 1
    if PART & 1:
        slot = tl.arange(0, BK)
        for i in range(me, n_mine, tl.num_programs(0)):
            mine = (me * 0).to(tl.int64) + i
            row = first + mine
            expert = tl.load(expert_ptr + mine * K + slot, mask=slot < K, other=N_EXPERTS)
            weight = tl.load(weight_ptr + mine * K + slot, mask=slot < K, other=0.0).to(tl.float32)
            for step in tl.static_range(1, SIZE + 1):
                peer = (RANK + step) % SIZE
                base = tl.load(address_ptr + peer)
                local = tl.load(table_ptr + peer * (N_EXPERTS + 1) + expert)
                tl.store((base + EXPERT_AT).to(tl.pointer_type(tl.int32)) + row * K + slot, local, mask=slot < K)
                tl.store((base + WEIGHT_AT).to(tl.pointer_type(tl.float32)) + row * K + slot, weight, mask=slot < K)
                nowhere = tl.load(table_ptr + peer * (N_EXPERTS + 1) + N_EXPERTS)
                wanted = (tl.max((local != nowhere).to(tl.int32), 0) > 0) | EVERY_ROW
                to_ptr = tl.multiple_of((base + X_AT).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16) + row * H
                for start in tl.static_range(0, H, BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    x = tl.load(x_ptr + mine * H + column, mask=column < H)
                    tl.store(to_ptr + column, x, mask=(column < H) & wanted)
        if me == 0:
            for peer in tl.static_range(SIZE):
                span_ptr = (tl.load(address_ptr + peer) + SPAN_AT).to(tl.pointer_type(tl.int32)) + 2 * RANK
                tl.store(span_ptr, first)
                tl.store(span_ptr + 1, n_mine)
        _signal(address_ptr, me, epoch, RANK, SIZE, N_PLACES)
    if PART & 2:
        _wait(address_ptr, me, epoch, RANK, SIZE, N_PLACES, PATIENCE)
        tl.store(epoch_ptr + me, epoch)


@triton.jit
def _sum_of_slots(
    y_ptr, expert_ptr, weight_ptr, base_ptr, row, column, inside, N_LOCAL: tl.constexpr, K: tl.constexpr,
    N_SHARED: tl.constexpr, HAS_BASE: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    row = row.to(tl.int64)
    if HAS_BASE:
        total += tl.load(base_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
    row_ptr = y_ptr + row * (K + N_SHARED) * H + column
    for slot in tl.static_range(K):
        here = tl.load(expert_ptr + row * K + slot) < N_LOCAL
        weight = tl.load(weight_ptr + row * K + slot).to(tl.float32)
        y = tl.load(row_ptr + slot * H, mask=inside & here, other=0.0).to(tl.float32)
        total += y * tl.where(here, weight, 0.0)
    for slot in tl.static_range(K, K + N_SHARED):
        total += tl.load(row_ptr + slot * H, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["n_most", "n_mine"])
def _combine_kernel(
    y_ptr, expert_ptr, weight_ptr, base_ptr, out_ptr, address_ptr, epoch_ptr, n_most, n_mine, N_LOCAL: tl.constexpr,
    K: tl.constexpr, N_SHARED: tl.constexpr, HAS_BASE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
    H: tl.constexpr, N_COLUMNS: tl.constexpr, SPAN_AT: tl.constexpr, BACK_AT: tl.constexpr, PART: tl.constexpr,
    N_PLACES: tl.constexpr, PATIENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Tile i of a rank's rows is the business of one program on all ranks: who sends it and who adds it up.
    me = tl.program_id(0)
    n_programs = tl.num_programs(0)
    epoch = tl.load(epoch_ptr + N_PLACES + me) + 1
    place = SIZE * N_PLACES + me
    if PART & 1:
        span_ptr = (tl.load(address_ptr + RANK) + SPAN_AT).to(tl.pointer_type(tl.int32))
        for tile in range(me, n_most * N_COLUMNS, n_programs):
            i = (me * 0).to(tl.int64) + tile // N_COLUMNS
            column = (tile % N_COLUMNS) * BLOCK + tl.arange(0, BLOCK)
            for step in tl.static_range(1, SIZE + 1):
                peer = (RANK + step) % SIZE
                inside = (column < H) & (i < tl.load(span_ptr + 2 * peer + 1))
                row = tl.load(span_ptr + 2 * peer) + i
                row = tl.where(i < tl.load(span_ptr + 2 * peer + 1), row, 0)
                total = _sum_of_slots(
                    y_ptr, expert_ptr, weight_ptr, base_ptr, row, column, inside, N_LOCAL, K, N_SHARED, HAS_BASE, H,
                    BLOCK
                )  # fmt: skip
                to_ptr = (tl.load(address_ptr + peer) + BACK_AT).to(tl.pointer_type(out_ptr.dtype.element_ty))
                to_ptr = tl.multiple_of(to_ptr, 16) + (i * SIZE + RANK) * H
                tl.store(to_ptr + column, total.to(out_ptr.dtype.element_ty), mask=inside)
        _signal(address_ptr, place, epoch, RANK, SIZE, N_PLACES)
    if PART & 2:
        _wait(address_ptr, place, epoch, RANK, SIZE, N_PLACES, PATIENCE)
        back_ptr = (tl.load(address_ptr + RANK) + BACK_AT).to(tl.pointer_type(out_ptr.dtype.element_ty))
        back_ptr = tl.multiple_of(back_ptr, 16)
        for tile in range(me, n_mine * N_COLUMNS, n_programs):
            i = (me * 0).to(tl.int64) + tile // N_COLUMNS
            column = (tile % N_COLUMNS) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for rank in tl.static_range(SIZE):
                from_ptr = back_ptr + (i * SIZE + rank) * H + column
                total += tl.load(from_ptr, mask=column < H, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(out_ptr + i * H + column, total, mask=column < H)
        tl.store(epoch_ptr + N_PLACES + me, epoch)
