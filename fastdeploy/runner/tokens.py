"""Where the tokens that a step samples go, so that the next step starts from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.runner.batch_state import PLACEHOLDER, BatchState, StepInputs
from fastdeploy.runner.sampling_state import host_to_device
from fastdeploy.runner.transfer import Arriving, Packed
from fastdeploy.wire.messages import SlotStart


class Tokens(Protocol):
    """Tokens of the slots, between sampling and their next step."""

    def start(self, starts: Sequence[SlotStart]) -> None:
        """Requests take slots; the batch state knows their tokens already."""
        ...

    def ids(self, inputs: StepInputs) -> Tensor:
        """int64 [t] token ids of a step, on its device."""
        ...

    def append(self, slots: NDArray[np.int64], token_ids_r: Tensor) -> None:
        """Each slot's sampled token becomes its next token."""
        ...

    def send(self, token_ids_r: Tensor) -> Callable[[], list[int]]:
        """Start the way to the host; the function returned waits for the arrival."""
        ...


class HostTokens:
    """Tokens in the batch state's arrays: for a CPU, where nothing is gained by not looking at them."""

    def __init__(self, state: BatchState) -> None:
        self._state = state

    def start(self, starts: Sequence[SlotStart]) -> None:
        """Nothing to do."""

    def ids(self, inputs: StepInputs) -> Tensor:
        """A view of the step's own array."""
        return torch.from_numpy(inputs.ids_t)

    def append(self, slots: NDArray[np.int64], token_ids_r: Tensor) -> None:
        """Write the ids."""
        self._state.append(slots, token_ids_r.numpy())

    def send(self, token_ids_r: Tensor) -> Callable[[], list[int]]:
        """They are here."""
        return token_ids_r.tolist


class DeviceTokens:
    """The newest token of each slot on the device; the host goes on without knowing it.

    A sampled token is always the newest of its slot when it is computed, so one per slot is enough; the tokens that a
    request came with are known to the host.
    """

    def __init__(self, state: BatchState, max_slots: int, device: torch.device) -> None:
        self._state = state
        self._device = device
        # The last one is no slot's: rows that only fill up a batch write there.
        self.newest_s = torch.zeros(max_slots + 1, dtype=torch.int64, device=device)

    def start(self, starts: Sequence[SlotStart]) -> None:
        """The last known token of each request is its newest."""
        if starts:
            rows = np.array([[start.slot, start.token_ids[-1]] for start in starts], np.int64).T
            slot_s, id_s = host_to_device(np.ascontiguousarray(rows), self._device)
            self.newest_s.index_copy_(0, slot_s, id_s)

    def ids(self, inputs: StepInputs) -> Tensor:
        """The ids that the host knows, sent, and the newest token in place of each placeholder."""
        ids_t = host_to_device(inputs.ids_t, self._device)
        late = np.flatnonzero(inputs.ids_t[inputs.row_s] == PLACEHOLDER)
        if len(late):
            row_l, slot_l = Packed.send([inputs.row_s[late], inputs.slot_s[late]], self._device).parts
            ids_t.index_copy_(0, row_l.long(), self.newest_s.index_select(0, slot_l))
        return ids_t

    def append(self, slots: NDArray[np.int64], token_ids_r: Tensor) -> None:
        """Keep the ids on the device."""
        self.newest_s.index_copy_(0, host_to_device(slots, self._device), token_ids_r)
        self.count(slots)

    def count(self, slots: NDArray[np.int64]) -> None:
        """The device has stored a new token for each of these slots itself."""
        self._state.append(slots, PLACEHOLDER)

    def send(self, token_ids_r: Tensor) -> Callable[[], list[int]]:
        """Copy behind the work queued so far."""
        arriving = Arriving(token_ids_r)
        return lambda: arriving.read().tolist()
