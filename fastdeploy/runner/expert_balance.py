"""A rank's part in balancing experts: it counts, and between two steps moves weights along with all other ranks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeploy.config.schema import EplbConfig
from fastdeploy.distributed.collectives import group_errors
from fastdeploy.distributed.expert_moves import exchange, moves_of
from fastdeploy.distributed.expert_placement import busiest_over_mean, rebalance
from fastdeploy.distributed.groups import Group
from fastdeploy.layers.moe.expert_slots import ExpertSlots, stacked_weights
from fastdeploy.layers.moe.layer import SparseMoE
from fastdeploy.wire.experts import ExpertReport

log = logging.getLogger("fastdeploy.experts")


class ExpertBalancer:
    """All sparse layers of a rank. `report` may be called by another thread than `rearrange`."""

    def __init__(self, layers: Sequence[SparseMoE], group: Group, config: EplbConfig) -> None:
        """Raises ConfigError when the weights of these layers cannot be moved."""
        self._group, self._min_gain = group, config.min_gain
        self._slots_l: list[ExpertSlots] = []
        self._stacks_l: list[list[Tensor]] = []
        for layer in layers:
            assert layer.slots is not None, "a layer whose experts stay where they are"
            self._slots_l.append(layer.slots)
            self._stacks_l.append(stacked_weights(layer.experts, layer.n_local))
        # One tensor for all layers: it is read at once.
        self._rows_le = torch.stack([slots.rows_e for slots in self._slots_l])
        for slots, rows_e in zip(self._slots_l, self._rows_le, strict=True):
            slots.rows_e = rows_e
        self._total_le = torch.zeros(self._rows_le.shape, dtype=torch.int64)
        self._recent_le = torch.zeros(self._rows_le.shape, dtype=torch.int64)  # of all ranks, older ones weigh less
        self._lock = threading.Lock()
        self._n_checks = self._n_moved = 0
        self._pause_ms = 0.0
        self._before = self._after = 1.0

    def start(self) -> None:
        """Forget what was counted so far: what a rank computes before its first request tells nothing."""
        self._rows_le.zero_()

    def rearrange(self) -> None:
        """A collective of all ranks, between two steps: put experts where, going by recent rows, they should lie.

        Waits for the device. Rows of the time before the last call count half, those before that a quarter, and so on.
        """
        started_s, n_ranks = time.monotonic(), self._group.where.group_size
        self._recent_le = self._recent_le // 2 + self._gather()
        rows_le = self._recent_le.tolist()
        before = [slots.slots for slots in self._slots_l]
        after = rebalance(rows_le, before, n_ranks, self._min_gain)
        n_moved = 0
        for slots, stacks, old, new in zip(self._slots_l, self._stacks_l, before, after, strict=True):
            if new != old:
                exchange(stacks, moves_of(old, new, n_ranks, self._group.where.group_rank), self._group)
                slots.move_to(new)
                n_moved += sum(a != b for a, b in zip(old, new, strict=True))
        ratios = (busiest_over_mean(rows_le, slots_l, n_ranks) for slots_l in (before, after))
        with self._lock:
            self._before, self._after = ratios
            self._n_checks += 1
            self._n_moved += n_moved
            self._pause_ms += 1000 * (time.monotonic() - started_s)
        log.info("busiest over mean rank: %.3f, after %d moves %.3f", self._before, n_moved, self._after)

    def report(self) -> ExpertReport:
        """What was counted and done since the start."""
        with self._lock:
            return ExpertReport(
                rows_le=(self._total_le + self._rows_le.cpu()).tolist(),
                slots_lp=[list(slots.slots) for slots in self._slots_l],
                n_checks_total=self._n_checks,
                n_moved_total=self._n_moved,
                pause_ms_total=round(self._pause_ms),
                before=self._before,
                after=self._after,
            )

    def _gather(self) -> Tensor:
        """int64 [layer, expert]: rows of all ranks since the last call, on the host."""
        assert self._group.everyone is not None, "a rank by itself has nothing to balance"
        rows_gle = self._rows_le.new_empty(self._group.where.group_size, *self._rows_le.shape)
        with group_errors(self._group.name):
            # As bytes: gloo knows few types.
            self._group.everyone._allgather_base(
                rows_gle.view(-1).view(torch.uint8), self._rows_le.view(-1).view(torch.uint8)
            ).wait()
        with self._lock:
            self._rows_le.zero_()
            rows_gle = rows_gle.cpu()  # once it is here, so are the zeros: `report` reads by another stream
            self._total_le += rows_gle[self._group.where.group_rank]
        return rows_gle.sum(0)
