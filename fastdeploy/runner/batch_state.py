"""Per-slot arrays of a rank that live across steps: token ids, counts, page tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdeploy.layers.attention.base import BatchLayout
from fastdeploy.wire.messages import SlotStart, StepPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A plan as arrays: s granted slots, t tokens, in plan order.

    `row_s` is the index of each slot's last token among the t.
    """

    ids_t: NDArray[np.int64]
    position_t: NDArray[np.int64]
    layout: BatchLayout
    row_s: NDArray[np.int64]


class BatchState:
    """What a rank remembers of the requests in its batch slots."""

    def __init__(self, max_slots: int, max_tokens: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.tokens_sn = np.zeros((max_slots, max_tokens + 1), np.int32)
        self.n_known_s = np.zeros(max_slots, np.int32)
        self.n_computed_s = np.zeros(max_slots, np.int32)
        self.n_prompt_s = np.zeros(max_slots, np.int32)
        self.page_table_sp = np.zeros((max_slots, -(-max_tokens // page_tokens) + 1), np.int32)
        self.n_pages_s = np.zeros(max_slots, np.int32)

    def start(self, start: SlotStart) -> None:
        """A request takes its slot."""
        slot, n_tokens = start.slot, len(start.token_ids)
        self.tokens_sn[slot, :n_tokens] = start.token_ids
        self.n_known_s[slot] = n_tokens
        self.n_computed_s[slot] = start.n_computed
        self.n_prompt_s[slot] = start.n_prompt_tokens
        self.n_pages_s[slot] = 0
        self._add_pages(slot, start.page_ids)

    def advance(self, plan: StepPlan) -> StepInputs:
        """Take the plan's pages in, lay out its tokens, and count them as computed."""
        for slot, pages in zip(plan.slots, plan.new_pages, strict=True):
            if pages:
                self._add_pages(slot, pages)
        slot_s = np.asarray(plan.slots, np.int64)
        n_new_s = np.asarray(plan.n_tokens, np.int32)
        first_s = self.n_computed_s[slot_s]
        end_s = np.cumsum(n_new_s)
        n_tokens = int(end_s[-1])
        slot_t = np.repeat(slot_s, n_new_s)
        position_t = np.arange(n_tokens) + np.repeat(first_s - (end_s - n_new_s), n_new_s)
        page_t = self.page_table_sp[slot_t, position_t // self.page_tokens]
        n_context_s = first_s + n_new_s
        n_pages = -(-int(n_context_s.max()) // self.page_tokens)
        layout = BatchLayout(
            n_new_s,
            n_context_s,
            self.page_table_sp[slot_s, :n_pages],
            page_t.astype(np.int64) * self.page_tokens + position_t % self.page_tokens,
        )
        self.n_computed_s[slot_s] = n_context_s
        return StepInputs(
            self.tokens_sn[slot_t, position_t].astype(np.int64), position_t, layout, end_s.astype(np.int64) - 1
        )

    def append(self, slots: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Each slot's sampled token becomes its next token."""
        self.tokens_sn[slots, self.n_known_s[slots]] = token_ids
        self.n_known_s[slots] += 1

    def _add_pages(self, slot: int, page_ids: list[int]) -> None:
        n_before = self.n_pages_s[slot]
        self.page_table_sp[slot, n_before : n_before + len(page_ids)] = page_ids
        self.n_pages_s[slot] += len(page_ids)
