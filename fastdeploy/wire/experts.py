"""What ranks tell of their experts, with `--enable-eplb`."""

from __future__ import annotations

import msgspec


class ExpertReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How experts are used and where they lie, by sparse layer; since the start of the ranks.

    `rows_le[l][e]`: rows that these ranks sent to expert e. `slots_lp[l][p]`: the expert in slot p of all ranks.
    `before` and `after`: what the busiest rank computes over what the mean rank does, as the last check found and left
    it. All but `rows_le` are the same on all ranks of a group.
    """

    rows_le: list[list[int]]
    slots_lp: list[list[int]]
    n_checks_total: int
    n_moved_total: int  # slots that got another expert
    pause_ms_total: int  # of all checks: no step ran
    before: float
    after: float
