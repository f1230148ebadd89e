"""What a front end can tell of the experts of its ranks, and do about where they lie."""

from __future__ import annotations

import asyncio
import time

from fastdeploy.errors import EngineUnavailable
from fastdeploy.frontend.coordinator import Coordinator
from fastdeploy.observability.experts import together
from fastdeploy.wire.experts import ExpertReport

PATIENCE_S = 60.0
_POLL_S = 0.05


class ExpertDesk:
    """The experts behind one front end, with `--enable-eplb`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def report(self) -> ExpertReport | None:
        """As the ranks told last, about once a second; None before their first step."""
        return together({rank: s.experts for rank, s in self._coordinator.statuses().items() if s.experts is not None})

    async def rearrange(self) -> ExpertReport:
        """Have experts put where they should lie before the next step; what the ranks tell afterwards.

        Raises EngineUnavailable when no rank serves, or none tells in time.
        """
        before = self._n_checks()
        self._coordinator.rearrange()
        deadline_s = time.monotonic() + PATIENCE_S
        while self._n_checks() <= before:
            if time.monotonic() > deadline_s:
                raise EngineUnavailable(f"the ranks have not told of a rearrangement of experts for {PATIENCE_S:.0f} s")
            await asyncio.sleep(_POLL_S)
        report = self.report()
        assert report is not None, "a check was counted that nobody told of"
        return report

    def _n_checks(self) -> int:
        statuses = self._coordinator.statuses().values()
        return max((s.experts.n_checks_total for s in statuses if s.experts is not None), default=0)
