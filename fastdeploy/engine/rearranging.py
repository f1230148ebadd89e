"""When an engine core wants the experts of its group to be put where they should lie."""

from __future__ import annotations

from fastdeploy.config.schema import EngineConfig


class RearrangeClock:
    """Wants it every so many seconds in the core of data rank 0, and in any core when somebody asked for it."""

    def __init__(self, config: EngineConfig, now_s: float) -> None:
        eplb = config.eplb
        leads = config.parallel.data_rank == 0
        self._interval_s = eplb.interval_s if eplb is not None and leads and eplb.interval_s > 0 else None
        self._done_s = now_s
        self.asked = False  # by a client: also when there is nothing to compute

    def wanted(self, now_s: float) -> bool:
        """Whether the next step should begin with it."""
        return self.asked or (self._interval_s is not None and now_s - self._done_s >= self._interval_s)

    def done(self, now_s: float) -> None:
        """A step begins with it."""
        self.asked, self._done_s = False, now_s
