"""What ranks tell of their experts, as one report."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fastdeploy.wire.experts import ExpertReport


def together(report_of: Mapping[int, ExpertReport]) -> ExpertReport | None:
    """Rows added up; all else is the same on all ranks, but for when they told: the newest. None for none."""
    if not report_of:
        return None
    reports = list(report_of.values())
    layers = zip(*(report.rows_le for report in reports), strict=True)
    rows_le = [[sum(rows) for rows in zip(*layer, strict=True)] for layer in layers]
    return msgspec.structs.replace(max(reports, key=lambda report: report.n_checks_total), rows_le=rows_le)
