"""Per-slot arrays of a rank that live across steps: token ids, counts, page tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdeploy.layers.attention.base import BatchLayout
from fastdeploy.wire.messages import SlotStart, StepAgreement, StepPlan

PLACEHOLDER = -1  # a token whose id only the device knows


@dataclass(frozen=True, slots=True)
class Grants:
    """What a plan grants, in its order: s slots, their new tokens, and their tokens with the new ones."""

    slot_s: NDArray[np.int64]
    n_new_s: NDArray[np.int32]
    n_context_s: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Grants as arrays over their t tokens. `ids_t` may end each slot's with PLACEHOLDER.

    `row_s` is the index of each slot's last token among the t.
    """

    slot_s: NDArray[np.int64]
    ids_t: NDArray[np.int64]
    position_t: NDArray[np.int64]
    layout: BatchLayout
    row_s: NDArray[np.int64]
    agreement: StepAgreement | None = None


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

    def grant(self, plan: StepPlan) -> Grants:
        """Take the plan's pages in and count its tokens as computed; a plan may grant nothing."""
        for slot, pages in zip(plan.slots, plan.new_pages, strict=True):
            if pages:
                self._add_pages(slot, pages)
        slot_s = np.asarray(plan.slots, np.int64)
        n_new_s = np.asarray(plan.n_tokens, np.int32)
        n_context_s = self.n_computed_s[slot_s] + n_new_s
        self.n_computed_s[slot_s] = n_context_s
        return Grants(slot_s, n_new_s, n_context_s)

    def inputs(self, grants: Grants, agreement: StepAgreement | None = None) -> StepInputs:
        """Lay out the tokens of the grants."""
        slot_s, n_new_s, n_context_s = grants.slot_s, grants.n_new_s, grants.n_context_s
        end_s = np.cumsum(n_new_s)
        slot_t = np.repeat(slot_s, n_new_s)
        position_t = np.arange(len(slot_t)) + np.repeat(n_context_s - end_s, n_new_s)
        n_pages = -(-int(n_context_s.max(initial=0)) // self.page_tokens)
        layout = BatchLayout(
            n_new_s,
            n_context_s,
            self.page_table_sp[slot_s, :n_pages],
            self.kv_slots(slot_t, position_t),
        )
        ids_t = self.tokens_sn[slot_t, position_t].astype(np.int64)
        return StepInputs(slot_s, ids_t, position_t, layout, end_s.astype(np.int64) - 1, agreement)

    def kv_slots(self, slot_t: NDArray[np.int64], position_t: NDArray[np.int64]) -> NDArray[np.int64]:
        """page * page_tokens + offset of each position of a slot."""
        page_t = self.page_table_sp[slot_t, position_t // self.page_tokens].astype(np.int64)
        return page_t * self.page_tokens + position_t % self.page_tokens

    def append(self, slots: NDArray[np.int64], token_ids: NDArray[np.int64] | int) -> None:
        """Each slot's sampled token, or PLACEHOLDER for it, becomes its next token."""
        self.tokens_sn[slots, self.n_known_s[slots]] = token_ids
        self.n_known_s[slots] += 1

    def _add_pages(self, slot: int, page_ids: list[int]) -> None:
        n_before = self.n_pages_s[slot]
        self.page_table_sp[slot, n_before : n_before + len(page_ids)] = page_ids
        self.n_pages_s[slot] += len(page_ids)
