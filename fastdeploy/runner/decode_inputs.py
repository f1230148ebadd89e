"""Inputs of a captured decode step: fixed device memory, filled by one small copy of what the host knows.

The page table of every slot stays on the device. A decode step brings at most one new page per row; slots that a step
outside the graphs changed are sent whole before the next captured one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastdeploy.kernels.begin_decode import begin_decode
from fastdeploy.layers.attention.base import DecodeBatch
from fastdeploy.runner.batch_state import BatchState, Grants
from fastdeploy.runner.sampling_state import host_to_device
from fastdeploy.runner.tokens import DeviceTokens

_N_STAGED = 4  # host buffers in turn: more than steps can be in flight
_FIELDS = ("slot", "write_slot", "position", "n_context", "kv_slot", "column", "page")


class DecodeInputs:
    """One row per sequence: its slot, position, context, where its key and value go, and its new page if it has one.

    Rows that fill up a batch repeat the first one, so that they ask for no other experts or pages, but store nothing.
    Without a first one they stand in a slot that is nobody's.
    """

    def __init__(
        self, state: BatchState, tokens: DeviceTokens, rotation_pd: Tensor, max_rows: int, device: torch.device
    ) -> None:
        self._state = state
        self._tokens = tokens
        self._rotation_pd = rotation_pd
        n_slots, n_columns = state.page_table_sp.shape
        self._nobody = n_slots
        self.page_table_sp = torch.zeros((n_slots + 1, n_columns), dtype=torch.int32, device=device)
        self._stale = set[int]()
        self._staged = [torch.zeros((len(_FIELDS), max_rows), dtype=torch.int32).pin_memory() for _ in range(_N_STAGED)]
        self._sent = [torch.cuda.Event() for _ in range(_N_STAGED)]
        self._turn = 0
        self._rows = torch.zeros((len(_FIELDS), max_rows), dtype=torch.int32, device=device)

    def touch(self, slots: Iterable[int]) -> None:
        """The page tables of these slots changed on the host only."""
        self._stale.update(slots)

    def fill(self, grants: Grants, n_new_pages_s: list[int], n_rows: int) -> None:
        """Send the rows of a decode step that fills up to `n_rows`; `n_new_pages_s` as planned, at most one each."""
        self._refresh()
        self._turn = (self._turn + 1) % _N_STAGED
        self._sent[self._turn].synchronize()  # long past: that step's result has been read
        staged = self._staged[self._turn]
        rows, n = staged.numpy(), len(grants.slot_s)
        slot_s, position_s = grants.slot_s, grants.n_context_s.astype(np.int64) - 1
        is_new_s = np.asarray(n_new_pages_s, np.bool_)
        column_s = np.where(is_new_s, self._state.n_pages_s[slot_s] - 1, -1)
        rows[0, :n] = rows[1, :n] = slot_s
        rows[2, :n] = position_s
        rows[3, :n] = grants.n_context_s
        rows[4, :n] = self._state.kv_slots(slot_s, position_s)
        rows[5, :n] = column_s
        rows[6, :n] = self._state.page_table_sp[slot_s, column_s]
        first = rows[[0, 2, 3], 0] if n else np.array([self._nobody, 0, 1], np.int32)
        rows[[0, 2, 3], n:n_rows] = first[:, None]
        rows[1, n:n_rows] = self._nobody
        rows[4:6, n:n_rows] = -1
        self._rows.copy_(staged, non_blocking=True)
        self._sent[self._turn].record()

    def park(self, n_rows: int) -> None:
        """Rows that stand in nobody's slot, for a capture."""
        nothing = np.zeros(0, np.int64)
        self.fill(Grants(nothing, nothing.astype(np.int32), nothing.astype(np.int32)), [], n_rows)

    def batch(self, n_rows: int) -> DecodeBatch:
        """The rows as the attention backend sees them."""
        rows = self._rows[:, :n_rows]
        return DecodeBatch(self.page_table_sp, rows[0], rows[3], rows[4])

    def begin(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """(ids [n_rows], rotation [n_rows, D/2]); a part of the captured step."""
        rows = self._rows[:, :n_rows]
        return begin_decode(
            rows[0], rows[2], rows[5], rows[6], self._tokens.newest_s, self._rotation_pd, self.page_table_sp
        )

    def write_slots(self, n_rows: int) -> Tensor:
        """int32: where in `DeviceTokens.newest_s` each row's sampled token goes."""
        return self._rows[1, :n_rows]

    def _refresh(self) -> None:
        if self._stale:
            slots = np.fromiter(self._stale, np.int64)
            device = self.page_table_sp.device
            # No column is sent that no row uses.
            n_columns = int(self._state.n_pages_s[slots].max(initial=0))
            pages = host_to_device(np.ascontiguousarray(self._state.page_table_sp[slots, :n_columns]), device)
            self.page_table_sp[:, :n_columns].index_copy_(0, host_to_device(slots, device), pages)
            self._stale.clear()
