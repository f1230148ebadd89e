"""The order in which grouped matmuls see rows: sorting (token, slot) pairs by expert, gathering, and summing back.

Every token has `k` routed slots and `n_shared` slots of experts that all tokens pass; slot j of token t is the pair
`t * (k + n_shared) + j`. Routed ids lie in 0..n_local, where n_local means "that expert is not here" and costs nothing.
The shared experts are the groups n_local..n_local + n_shared - 1. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeploy.kernels.overlap import await_previous, overlaps

_MAX_TILE = 4096
_GATHER_ROWS = 4


def sort_pairs_ref(expert_tk: Tensor, n_local: int, n_shared: int = 0) -> tuple[Tensor, Tensor]:
    """What `sort_pairs` computes; entries of pair_p behind offset_g[-1] have no meaning and are 0 here."""
    shared_ts = torch.arange(n_local, n_local + n_shared, device=expert_tk.device).expand(expert_tk.shape[0], -1)
    routed_tk = expert_tk.long().masked_fill(expert_tk >= n_local, n_local + n_shared)
    group_p = torch.cat((routed_tk, shared_ts), 1).flatten()
    pair_p = group_p.argsort(stable=True)
    offset_g = torch.bincount(group_p, minlength=n_local + n_shared + 1).cumsum(0)[:-1]
    here_p = torch.arange(pair_p.numel(), device=pair_p.device) < offset_g[-1]
    return torch.where(here_p, pair_p, 0).int(), torch.cat((offset_g.new_zeros(1), offset_g)).int()


def sort_pairs(expert_tk: Tensor, n_local: int, n_shared: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, stable.

    `expert_tk` int32 or int64 [t, k]. Returns pair_p int32 [t * (k + n_shared)] and offset_g int32 [groups + 1]: group
    g owns pair_p[offset_g[g] : offset_g[g + 1]]; what lies behind offset_g[-1] is not written.
    """
    n_tokens, n_slots = expert_tk.shape[0], expert_tk.shape[1] + n_shared
    n_pairs, n_groups = n_tokens * n_slots, n_local + n_shared
    pair_p = torch.empty(n_pairs, dtype=torch.int32, device=expert_tk.device)
    offset_g = torch.empty(n_groups + 1, dtype=torch.int32, device=expert_tk.device)
    tile = min(_MAX_TILE, max(128, triton.next_power_of_2(n_pairs)))
    n_parts, pdl = max(1, triton.cdiv(n_pairs, tile)), overlaps(expert_tk.device)
    expert_tk = expert_tk.contiguous()
    options = {"num_warps": min(16, max(4, tile // 256)), "launch_pdl": pdl}
    count_qg = None
    if n_parts > 1:
        count_qg = torch.empty(n_parts, n_groups, dtype=torch.int32, device=expert_tk.device)
        _count_kernel[(n_groups, n_parts)](
            expert_tk, count_qg, n_pairs, n_local, n_shared, n_slots - n_shared, tile, pdl, **options
        )
    _sort_kernel[(n_groups, n_parts)](
        expert_tk, count_qg, pair_p, offset_g, n_pairs, n_parts, n_local, n_shared, n_slots - n_shared,
        triton.next_power_of_2(n_groups), triton.next_power_of_2(n_parts), n_parts > 1, tile, pdl, **options,
    )  # fmt: skip
    return pair_p, offset_g


@triton.jit
def group_of(expert_ptr, pair, mask, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr, K: tl.constexpr):
    """The group of a pair; N_LOCAL + N_SHARED when its expert is not here or `mask` is off."""
    slot = pair % (K + N_SHARED)
    routed = tl.load(expert_ptr + (pair // (K + N_SHARED)) * K + slot, mask=mask & (slot < K), other=N_LOCAL).to(
        tl.int32
    )
    group = tl.where(routed >= N_LOCAL, N_LOCAL + N_SHARED, routed)
    return tl.where(mask & (slot >= K), N_LOCAL + slot - K, group)


@triton.jit(do_not_specialize=["n_pairs"])
def _count_kernel(
    expert_ptr, count_ptr, n_pairs, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    group, part = tl.program_id(0), tl.program_id(1)
    pair = part * TILE + tl.arange(0, TILE)
    mine = group_of(expert_ptr, pair, pair < n_pairs, N_LOCAL, N_SHARED, K) == group
    tl.store(count_ptr + part * (N_LOCAL + N_SHARED) + group, tl.sum(mine.to(tl.int32), 0))


@triton.jit(do_not_specialize=["n_pairs", "n_parts"])
def _sort_kernel(
    expert_ptr, count_ptr, pair_ptr, offset_ptr, n_pairs, n_parts, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr,
    K: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program per group and part of the pairs, which reads all ids of its part: no program waits for another.
    await_previous(PDL)
    N_GROUPS: tl.constexpr = N_LOCAL + N_SHARED
    me, part = tl.program_id(0), tl.program_id(1)
    pair = part * TILE + tl.arange(0, TILE)
    group = group_of(expert_ptr, pair, pair < n_pairs, N_LOCAL, N_SHARED, K)
    mine = (group == me).to(tl.int32)
    if COUNTED:
        q, g = tl.arange(0, BP)[:, None], tl.arange(0, BG)[None, :]
        count = tl.load(count_ptr + q * N_GROUPS + g, mask=(q < n_parts) & (g < N_GROUPS), other=0)
        first = tl.sum(tl.sum(tl.where((g < me) | ((g == me) & (q < part)), count, 0), 1), 0)
        n_until = tl.sum(tl.sum(tl.where(g <= me, count, 0), 1), 0)
        tl.store(offset_ptr + me + 1, n_until)  # the same from each part
    else:
        first = tl.sum((group < me).to(tl.int32), 0)
        tl.store(offset_ptr + me + 1, first + tl.sum(mine, 0))
    if me == 0:
        tl.store(offset_ptr, 0)
    tl.store(pair_ptr + first + tl.cumsum(mine, 0) - 1, pair, mask=mine > 0)


def gather_rows_ref(x_tH: Tensor, pair_p: Tensor, offset_g: Tensor, n_slots: int) -> Tensor:
    """What `gather_rows` computes; rows behind offset_g[-1] have no meaning and are 0 here."""
    here_p1 = torch.arange(pair_p.numel(), device=x_tH.device)[:, None] < offset_g[-1]
    token_p = torch.where(here_p1[:, 0], pair_p, 0) // n_slots
    return torch.where(here_p1, x_tH[token_p] if x_tH.shape[0] else x_tH.new_zeros(0, x_tH.shape[1]), 0)


def gather_rows(x_tH: Tensor, pair_p: Tensor, offset_g: Tensor, n_slots: int) -> Tensor:
    """x of each sorted pair, [p, H]; rows behind offset_g[-1] are not written."""
    n_pairs, hidden_size = pair_p.numel(), x_tH.shape[1]
    x_pH = x_tH.new_empty(n_pairs, hidden_size)
    if n_pairs:
        block = min(512, triton.next_power_of_2(hidden_size))
        _gather_kernel[(triton.cdiv(n_pairs, _GATHER_ROWS),)](
            x_tH, pair_p, offset_g, x_pH, offset_g.numel() - 1, hidden_size, n_slots, _GATHER_ROWS, block, num_warps=4
        )
    return x_pH


@triton.jit
def _gather_kernel(
    x_ptr, pair_ptr, offset_ptr, out_ptr, n_groups, H: tl.constexpr, N_SLOTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(offset_ptr + n_groups)
    token = tl.load(pair_ptr + row, mask=inside, other=0) // N_SLOTS
    source = x_ptr + token.to(tl.int64)[:, None] * H
    target = out_ptr + row.to(tl.int64)[:, None] * H
    for first in tl.static_range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < H)
        tl.store(target + column, tl.load(source + column, mask=mask), mask=mask)


@dataclass(frozen=True, slots=True)
class SlotOutputs:
    """What experts made of rows, before a row's slots are added up.

    y_pH [r * (k + n_shared), H], slots of one row side by side. Of the k routed ones, expert_rk and weight_rk [r, k],
    only those below `n_local` count; None for k = 0. base_rH is added as it is.
    """

    y_pH: Tensor
    expert_rk: Tensor | None
    weight_rk: Tensor | None
    n_local: int
    n_shared: int
    base_rH: Tensor | None = None

    def summed(self) -> Tensor:
        """[r, H]."""
        assert self.expert_rk is not None and self.weight_rk is not None, "nothing to add up"
        return sum_slots(self.y_pH, self.expert_rk, self.weight_rk, self.n_local, self.n_shared, self.base_rH)


def sum_slots_ref(
    y_pH: Tensor, expert_tk: Tensor, weight_tk: Tensor, n_local: int, n_shared: int = 0, base_tH: Tensor | None = None
) -> Tensor:
    """What `sum_slots` computes."""
    (n_tokens, n_routed), hidden_size = expert_tk.shape, y_pH.shape[1]
    y_tjH = y_pH.view(n_tokens, n_routed + n_shared, hidden_size).float()
    here_tk1 = (expert_tk < n_local)[:, :, None]
    y_tH = torch.where(here_tk1, y_tjH[:, :n_routed] * weight_tk.float()[:, :, None], 0.0).sum(1)
    y_tH = y_tH + y_tjH[:, n_routed:].sum(1)
    return (y_tH if base_tH is None else y_tH + base_tH.float()).to(y_pH.dtype)


def sum_slots(
    y_pH: Tensor, expert_tk: Tensor, weight_tk: Tensor, n_local: int, n_shared: int = 0, base_tH: Tensor | None = None
) -> Tensor:
    """Sum of a token's slots [t, H], in float32: routed ones weighted, shared ones and `base_tH` as they are.

    `y_pH` [t * (k + n_shared), H] lies in pair order; rows of experts that are not here are never read.
    """
    (n_tokens, n_routed), hidden_size = expert_tk.shape, y_pH.shape[1]
    out_tH = y_pH.new_empty(n_tokens, hidden_size)
    if n_tokens:
        block = min(1024 if n_tokens >= 512 else 256, triton.next_power_of_2(hidden_size))
        pdl = overlaps(y_pH.device)
        _sum_kernel[(n_tokens, triton.cdiv(hidden_size, block))](
            y_pH, expert_tk.contiguous(), weight_tk.contiguous(), base_tH, out_tH, hidden_size, n_local, n_shared,
            n_routed, base_tH is not None, block, pdl, num_warps=max(1, block // 256), launch_pdl=pdl,
        )  # fmt: skip
    return out_tH


@triton.jit
def _sum_kernel(
    y_ptr, expert_ptr, weight_ptr, base_ptr, out_ptr, H: tl.constexpr, N_LOCAL: tl.constexpr, N_SHARED: tl.constexpr,
    K: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        total += tl.load(base_ptr + token * H + column, mask=inside, other=0.0).to(tl.float32)
    row_ptr = y_ptr + token * (K + N_SHARED) * H + column
    for slot in tl.static_range(K):
        here = tl.load(expert_ptr + token * K + slot) < N_LOCAL
        weight = tl.load(weight_ptr + token * K + slot).to(tl.float32)
        total += tl.load(row_ptr + slot * H, mask=inside & here, other=0.0).to(tl.float32) * tl.where(here, weight, 0.0)
    for slot in tl.static_range(K, K + N_SHARED):
        total += tl.load(row_ptr + slot * H, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + column, total, mask=inside)
