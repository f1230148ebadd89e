"""How long to wait before a server is started again."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_S = 1.0
LONGEST_S = 30.0
HEALTHY_S = 60.0  # a server that was ready for as long starts with a clean record


@dataclass(slots=True)
class Backoff:
    """1, 2, 4, ... 30 seconds for one server."""

    n_deaths: int = 0

    def next_delay_s(self, ready_s: float) -> float:
        """The server died after being ready for `ready_s`: seconds until its next start."""
        if ready_s >= HEALTHY_S:
            self.n_deaths = 0
        self.n_deaths += 1
        return min(FIRST_S * 2.0 ** min(self.n_deaths - 1, 10), LONGEST_S)
