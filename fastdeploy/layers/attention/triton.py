"""Paged attention in Triton kernels: rotary embedding and storing in one, decoding in one, prompt chunks in one.

Pages are [n_pages, 2, kv heads, page_tokens, D], so that a head's keys of a page lie side by side. Sequences with one
new token go to the decode kernel, all others to the prefill kernel, in the same step. In captured steps the decode
kernel does all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdeploy.errors import ConfigError
from fastdeploy.kernels.attention_decode import (
    DecodeRows,
    DecodeScratch,
    NewTokens,
    decode_attention,
    decode_tuning,
)
from fastdeploy.kernels.attention_hopper import TILE, fits_hopper, prefill_attention_hopper
from fastdeploy.kernels.attention_prefill import PrefillTiles, PrefillTuning, cut_tiles, prefill_attention
from fastdeploy.kernels.rope_kv import rope_and_store
from fastdeploy.layers.attention.base import AttentionShape, BatchLayout, DecodeBatch
from fastdeploy.runner.step import StepContext
from fastdeploy.runner.transfer import Packed

_SCRATCH_SEQS = 256  # more sequences than these take a larger scratch memory when they come


@dataclass(frozen=True, slots=True)
class TritonAttentionPlan:
    """Where keys and values go; the batch as decode rows and as tiles of prompt chunks, None where there are none."""

    slot_t: Tensor
    decode: DecodeRows | None
    prefill: PrefillTiles | None
    scratch: DecodeScratch  # held here, as a captured graph goes on using that of its capture
    one_each: bool = False  # every row is one decoding sequence's, in order


class TritonAttention:
    """See the module's text; implements GraphAttentionBackend. Raises ConfigError for heads the kernels cannot take."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        if shape.head_dim < 16 or shape.head_dim & (shape.head_dim - 1):
            raise ConfigError(
                f"head_dim is {shape.head_dim}: attention on a GPU needs a power of two from 16 on; use --device cpu"
            )
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.on_hopper = fits_hopper(device, dtype, shape.head_dim, shape.page_tokens)
        self.prefill_tuning = PrefillTuning(tile=TILE) if self.on_hopper else PrefillTuning()
        self._scratch = self._new_scratch(_SCRATCH_SEQS)
        self._n_scratch_seqs = _SCRATCH_SEQS

    def allocate(self, n_pages: int) -> list[Tensor]:
        """Zeroed pages: a key that nobody wrote must not be a NaN."""
        s = self.shape
        size = (n_pages, 2, s.n_kv_heads, s.page_tokens, s.head_dim)
        return [torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(s.n_layers)]

    def view(self, pages_p2hTD: Tensor) -> Tensor:
        return pages_p2hTD

    def page_bytes(self) -> int:
        s = self.shape
        return s.n_layers * s.page_tokens * 2 * s.n_kv_heads * s.head_dim * self.dtype.itemsize

    def prepare(self, batch: BatchLayout) -> TritonAttentionPlan:
        first_s = np.cumsum(batch.n_new_s, dtype=np.int64) - batch.n_new_s
        one = batch.n_new_s == 1
        decode, longer = np.flatnonzero(one), np.flatnonzero(batch.n_new_s > 1)
        tiles = cut_tiles(
            first_s[longer], batch.n_new_s[longer], batch.n_context_s[longer], longer, self.prefill_tuning.tile
        )
        self._make_room(len(decode))
        packed = Packed.send(
            [batch.page_table_sp, first_s[decode], decode, batch.n_context_s[decode], tiles, batch.slot_t], self.device
        )
        page_table, row_s, table_row_s, n_context_s, tile_i4, slot_t = packed.parts
        return TritonAttentionPlan(
            slot_t,
            DecodeRows(row_s, table_row_s, n_context_s, page_table) if len(decode) else None,
            PrefillTiles(tile_i4, page_table) if len(longer) else None,
            self._scratch,
        )

    def prepare_decode(self, batch: DecodeBatch) -> TritonAttentionPlan:
        n_seqs = batch.table_row_s.shape[0]
        self._make_room(n_seqs)
        row_s = torch.arange(n_seqs, dtype=torch.int32, device=self.device)
        rows = DecodeRows(row_s, batch.table_row_s, batch.n_context_s, batch.page_table)
        return TritonAttentionPlan(batch.slot_t, rows, None, self._scratch, one_each=True)

    def attend(self, qkv_thd: Tensor, layer: int, step: StepContext) -> Tensor:
        plan, pages, n_heads = step.attention, step.pages_l[layer], self.shape.n_heads
        assert isinstance(plan, TritonAttentionPlan)
        new = None
        if plan.one_each:
            new = NewTokens(qkv_thd, step.rotation_td, plan.slot_t)
        else:
            rope_and_store(qkv_thd, step.rotation_td, plan.slot_t, pages)
        q_thd = qkv_thd[:, :n_heads]
        out_thd = torch.empty(q_thd.shape, dtype=q_thd.dtype, device=q_thd.device)
        if plan.decode is not None:
            tuning = decode_tuning(plan.decode.row_s.shape[0])
            decode_attention(q_thd, out_thd, pages, plan.decode, plan.scratch, tuning, new)
        if plan.prefill is not None:
            if self.on_hopper:
                prefill_attention_hopper(q_thd, out_thd, pages, plan.prefill.tile_i4, plan.prefill.page_table)
            else:
                prefill_attention(q_thd, out_thd, pages, plan.prefill, self.prefill_tuning)
        return out_thd.flatten(1)

    def _new_scratch(self, n_seqs: int) -> DecodeScratch:
        s = self.shape
        return DecodeScratch(n_seqs, s.n_heads, s.n_kv_heads, s.head_dim, self.device)

    def _make_room(self, n_seqs: int) -> None:
        if n_seqs > self._n_scratch_seqs:
            self._n_scratch_seqs = 1 << (n_seqs - 1).bit_length()
            self._scratch = self._new_scratch(self._n_scratch_seqs)
