"""Paged attention in plain torch: the reference of every other backend, and the CPU path.

Pages are [n_pages, 2 * kv heads, page_tokens, D], keys before values: a head's tokens lie one after the other, and one
gather fetches a sequence's keys and values by head. Longer chunks (prefill) go one by one. Sequences with one new token
(decode) are attended by the C kernel that reads pages in place, where there is one; elsewhere together, padded to the
longest of their group, in groups cut so that padding stays small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.cpu.attention import DecodeBatch, PagedKernels
from fastdeploy.kernels.cpu.library import CpuKernels, kernels_for
from fastdeploy.layers.attention.base import AttentionShape, BatchLayout
from fastdeploy.layers.rotary import rotate_
from fastdeploy.runner.step import StepContext

_MAX_PADDING = 1.5  # a decode group's longest sequence over its shortest, in pages
_QUERY_BLOCK = 512  # rows of one prefill mask, which bounds its memory


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    rows_s: Tensor  # rows of this group's tokens among the step's tokens
    runs: Tensor  # [s * 2 kv heads * pages of the longest], as `_runs` numbers them
    mask_s11C: Tensor  # 0 where a key counts, -inf where it is padding


@dataclass(frozen=True, slots=True)
class _Prefill:
    first: int
    n_new: int
    n_context: int
    runs: Tensor  # [2 kv heads * pages]


@dataclass(frozen=True, slots=True)
class TorchAttentionPlan:
    """Where keys and values go, and the batch cut into decode groups and prefill chunks.

    `in_place` has the sequences with one new token where the C kernel attends them; `decodes` is empty then.
    """

    slot_t: Tensor
    in_place: DecodeBatch | None
    decodes: list[_DecodeGroup]
    prefills: list[_Prefill]


class TorchAttention:
    """See the module's text; implements AttentionBackend."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.kernels = _paged_kernels(shape, kernels_for(device, dtype))

    def allocate(self, n_pages: int) -> list[Tensor]:
        """Zeroed pages, because a masked NaN would still spoil a sum."""
        s = self.shape
        size = (n_pages, 2 * s.n_kv_heads, s.page_tokens, s.head_dim)
        if self.device.type != "cpu":
            return [torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(s.n_layers)]
        # numpy asks the system for zeroed memory, which costs nothing until a page is first touched.
        n_bytes = math.prod(size) * self.dtype.itemsize
        return [torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(self.dtype).view(size) for _ in range(s.n_layers)]

    def view(self, pages_p2hTD: Tensor) -> Tensor:
        return pages_p2hTD.flatten(1, 2)

    def page_bytes(self) -> int:
        s = self.shape
        return s.n_layers * s.page_tokens * 2 * s.n_kv_heads * s.head_dim * self.dtype.itemsize

    def prepare(self, batch: BatchLayout) -> TorchAttentionPlan:
        first_s = np.cumsum(batch.n_new_s) - batch.n_new_s
        n_pages_s = -(-batch.n_context_s // self.shape.page_tokens)
        prefills = [
            _Prefill(
                int(first_s[i]),
                int(batch.n_new_s[i]),
                int(batch.n_context_s[i]),
                self._tensor(self._runs(batch.page_table_sp[i, : n_pages_s[i]]).ravel()),
            )
            for i in np.flatnonzero(batch.n_new_s > 1)
        ]
        slot_t = self._tensor(batch.slot_t)
        if self.kernels is None:
            groups = _groups(batch.n_new_s, n_pages_s)
            decodes = [self._decode_group(batch, first_s, n_pages_s, group) for group in groups]
            return TorchAttentionPlan(slot_t, None, decodes, prefills)
        in_place, one_s = None, np.flatnonzero(batch.n_new_s == 1)
        if len(one_s):
            in_place = self.kernels.prepare(batch.page_table_sp[one_s], batch.n_context_s[one_s], first_s[one_s])
        return TorchAttentionPlan(slot_t, in_place, [], prefills)

    def attend(self, qkv_thd: Tensor, layer: int, step: StepContext) -> Tensor:
        s, plan, pages = self.shape, step.attention, step.pages_l[layer]
        assert isinstance(plan, TorchAttentionPlan)
        out_tX = None
        if plan.in_place is not None and self.kernels is not None:
            qkv_thd, rotation_td = qkv_thd.contiguous(), step.rotation_td.contiguous()
            out_tX = qkv_thd.new_empty(qkv_thd.shape[0], s.n_heads * s.head_dim)
            self.kernels.decode(plan.in_place, qkv_thd, rotation_td, pages, out_tX)
            if not plan.prefills:
                return out_tX
        qkv_thd = self._rotate_and_store(qkv_thd, pages, plan, step)
        q_thd = qkv_thd[:, : s.n_heads]
        if len(plan.decodes) == 1 and not plan.prefills:
            return self._decode(q_thd, pages, plan.decodes[0])
        if out_tX is None:
            out_tX = qkv_thd.new_empty(qkv_thd.shape[0], s.n_heads * s.head_dim)
        for group in plan.decodes:
            out_tX[group.rows_s] = self._decode(q_thd[group.rows_s], pages, group)
        for chunk in plan.prefills:
            rows = slice(chunk.first, chunk.first + chunk.n_new)
            out_tX[rows] = self._prefill(q_thd[rows], pages, chunk)
        return out_tX

    def _rotate_and_store(self, qkv_thd: Tensor, pages: Tensor, plan: TorchAttentionPlan, step: StepContext) -> Tensor:
        """The same with rotated queries."""
        s = self.shape
        if self.kernels is not None:
            qkv_thd = qkv_thd.contiguous()
            self.kernels.store_(qkv_thd, step.rotation_td.contiguous(), pages, plan.slot_t)
            return qkv_thd
        rotate_(qkv_thd[:, : s.n_heads + s.n_kv_heads], step.rotation_td)
        page_t, offset_t = plan.slot_t // s.page_tokens, plan.slot_t % s.page_tokens
        pages[page_t, :, offset_t] = qkv_thd[:, s.n_heads :]
        return qkv_thd

    def _decode(self, q_shd: Tensor, pages: Tensor, group: _DecodeGroup) -> Tensor:
        """One query each: the query heads that share a key head take the place of query positions."""
        s = self.shape
        n = q_shd.shape[0]
        kv_shCd = self._gather(pages, group.runs).view(n, 2 * s.n_kv_heads, -1, s.head_dim)
        k_shCd, v_shCd = kv_shCd.split(s.n_kv_heads, dim=1)
        q_shgd = q_shd.reshape(n, s.n_kv_heads, -1, s.head_dim)
        out_shgd = functional.scaled_dot_product_attention(q_shgd, k_shCd, v_shCd, attn_mask=group.mask_s11C)
        return out_shgd.reshape(n, -1)

    def _prefill(self, q_thd: Tensor, pages: Tensor, chunk: _Prefill) -> Tensor:
        s = self.shape
        kv_hCd = self._gather(pages, chunk.runs).view(2 * s.n_kv_heads, -1, s.head_dim)
        k_hCd, v_hCd = kv_hCd[:, : chunk.n_context].split(s.n_kv_heads, dim=0)
        n_before = chunk.n_context - chunk.n_new
        parts = []
        for start in range(0, chunk.n_new, _QUERY_BLOCK):
            q_hqd = q_thd[start : start + _QUERY_BLOCK].transpose(0, 1)
            n_q = q_hqd.shape[1]
            n_seen = n_before + start + n_q
            # Without a mask keys that no query sees are skipped; but SDPA aligns its own causal mask to the first key.
            is_first = n_seen == n_q
            mask_qC = None
            if not is_first:
                mask_qC = torch.ones(n_q, n_seen, dtype=torch.bool, device=q_thd.device).tril(n_before + start)
            out_1hqd = functional.scaled_dot_product_attention(
                q_hqd[None],
                k_hCd[None, :, :n_seen],
                v_hCd[None, :, :n_seen],
                attn_mask=mask_qC,
                is_causal=is_first,
                enable_gqa=True,
            )
            parts.append(out_1hqd[0].transpose(0, 1).reshape(n_q, -1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode_group(
        self, batch: BatchLayout, first_s: NDArray[np.int32], n_pages_s: NDArray[np.int32], group: NDArray[np.int64]
    ) -> _DecodeGroup:
        n_pages = int(n_pages_s[group].max())
        used_sp = np.arange(n_pages) < n_pages_s[group, None]
        pages_sp = np.where(used_sp, batch.page_table_sp[group, :n_pages], batch.page_table_sp[group, :1])
        counts_sC = np.arange(n_pages * self.shape.page_tokens) < batch.n_context_s[group, None]
        mask_s11C = torch.zeros(len(group), 1, 1, counts_sC.shape[1], dtype=self.dtype, device=self.device)
        mask_s11C.masked_fill_(~self._tensor(counts_sC)[:, None, None], -torch.inf)
        return _DecodeGroup(self._tensor(first_s[group]), self._tensor(self._runs(pages_sp).ravel()), mask_s11C)

    def _runs(self, pages_xp: NDArray[np.integer]) -> NDArray[np.int64]:
        """[..., 2 kv heads, p]: a run is one head's tokens in one page, numbered through all pages."""
        n_runs = 2 * self.shape.n_kv_heads
        return pages_xp[..., None, :].astype(np.int64) * n_runs + np.arange(n_runs)[:, None]

    def _gather(self, pages: Tensor, runs: Tensor) -> Tensor:
        return pages.view(-1, self.shape.page_tokens * self.shape.head_dim).index_select(0, runs)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        if array.dtype == np.int32:
            array = array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _paged_kernels(s: AttentionShape, kernels: CpuKernels | None) -> PagedKernels | None:
    if kernels is None or not PagedKernels.supports(s.n_heads, s.n_kv_heads, s.head_dim):
        return None
    return PagedKernels(kernels, s.n_heads, s.n_kv_heads, s.head_dim, s.page_tokens)


def _groups(n_new_s: NDArray[np.int32], n_pages_s: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """Sequences with one new token, cut where the longest would exceed `_MAX_PADDING` times the shortest.

    A batch that fits one group keeps its order, so that its rows are the step's rows.
    """
    decode = np.flatnonzero(n_new_s == 1)
    if len(decode) == 0:
        return []
    if len(decode) == 1 or n_pages_s[decode].max() <= _MAX_PADDING * n_pages_s[decode].min() + 1:
        return [decode]
    by_length = decode[np.argsort(n_pages_s[decode], kind="stable")]
    groups, start = [], 0
    for i in range(1, len(by_length) + 1):
        if i == len(by_length) or n_pages_s[by_length[i]] > _MAX_PADDING * n_pages_s[by_length[start]] + 1:
            groups.append(by_length[start:i])
            start = i
    return groups
