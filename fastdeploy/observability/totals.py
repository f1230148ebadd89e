"""The reports of several engine cores as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fastdeploy.wire.messages import PairingStatus, Status

_TOTALS = tuple(name for name in Status.__struct_fields__ if name.endswith("_total") and name != "n_pages_total")


class EngineTotal:
    """A total of an engine that also survives a new engine starting from zero."""

    __slots__ = ("_base", "_last")

    def __init__(self) -> None:
        self._base = 0
        self._last = 0

    def update(self, total: int) -> int:
        """The engine says `total`; returns what was added since it spoke last."""
        if total < self._last:
            self._base += self._last
            self._last = 0
        added = total - self._last
        self._last = total
        return added

    @property
    def value(self) -> int:
        """All engines together."""
        return self._base + self._last


class StatusTotals:
    """Adds up the Status of all data-parallel ranks; totals never fall, also when a rank started again from zero."""

    def __init__(self) -> None:
        self._total_of: dict[tuple[int, str], EngineTotal] = {}

    def add_up(self, statuses: Mapping[int, Status]) -> Status:
        """One Status for all ranks: sums, and the longest stall."""
        whole: dict[str, Any] = dict.fromkeys(Status.__struct_fields__, 0)
        whole["n_rows_of_expert"] = dict[int, int]()
        pairing: dict[str, Any] = dict.fromkeys(PairingStatus.__struct_fields__, 0)
        pairing["n_fallbacks_of_reason"] = dict[str, int]()
        whole["experts"] = None  # long lists, added up when somebody asks for them
        del whole["pairing"]
        for data_rank, status in statuses.items():
            for name, value in msgspec.structs.asdict(status).items():
                if name in _TOTALS:
                    total = self._total_of.setdefault((data_rank, name), EngineTotal())
                    total.update(value)
                    whole[name] += total.value
                elif name == "pairing":
                    self._add_pairing(pairing, data_rank, status.pairing)
                elif name == "experts":
                    continue
                elif name == "n_rows_of_expert":
                    whole[name].update(value)
                else:
                    whole[name] += value
        whole["stalled_s"] = max((status.stalled_s for status in statuses.values()), default=0.0)
        return Status(**whole, pairing=PairingStatus(**pairing))

    def _add_pairing(self, whole: dict[str, Any], data_rank: int, status: PairingStatus) -> None:
        for name, value in msgspec.structs.asdict(status).items():
            if name == "n_fallbacks_of_reason":
                for reason, n in value.items():
                    whole[name][reason] = whole[name].get(reason, 0) + self._total(data_rank, f"fallback {reason}", n)
            else:
                whole[name] += self._total(data_rank, name, value) if name.endswith("_total") else value

    def _total(self, data_rank: int, name: str, value: int) -> int:
        total = self._total_of.setdefault((data_rank, name), EngineTotal())
        total.update(value)
        return total.value
