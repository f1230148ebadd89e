"""The endpoints of `--enable-eplb`: how experts are used, where they lie, and to have them moved."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from fastdeploy.entrypoints.openai.error_response import json_response
from fastdeploy.entrypoints.openai.responses import ExpertPlaces, ExpertPlacesAnswer, ExpertRows, ExpertRowsAnswer
from fastdeploy.entrypoints.openai.service import NotSupported
from fastdeploy.entrypoints.openai.state import ServerState
from fastdeploy.frontend.experts import ExpertDesk
from fastdeploy.wire.experts import ExpertReport


async def rearrange(state: ServerState, request: Request) -> Response:
    """Has experts moved before the next step and waits for it. Raises `NotSupported`, `EngineUnavailable`."""
    return json_response(ExpertPlacesAnswer(_places(state, await _desk(state).rearrange())))


async def places(state: ServerState, request: Request) -> Response:
    """Which expert lies in which slot, and what the last check found. Raises `NotSupported`, `EngineUnavailable`."""
    return json_response(ExpertPlacesAnswer(_places(state, _desk(state).report())))


async def rows(state: ServerState, request: Request) -> Response:
    """Rows of each expert in each sparse layer. Raises `NotSupported`, `EngineUnavailable`."""
    report, moe = _desk(state).report(), state.config.model.shape.moe
    assert moe is not None, "experts are balanced where there are some"
    rows_le = report.rows_le if report else [[0] * moe.n_experts for _ in moe.layers]
    return json_response(ExpertRowsAnswer(ExpertRows(list(moe.layers), rows_le)))


def _desk(state: ServerState) -> ExpertDesk:
    if state.config.eplb is None:
        raise NotSupported("experts are not rebalanced: start the server with --enable-eplb, on more than one rank")
    desk = state.engine().experts
    assert desk is not None, "a server that balances experts has a desk"
    return desk


def _places(state: ServerState, report: ExpertReport | None) -> ExpertPlaces:
    eplb, moe, n_ranks = state.config.eplb, state.config.model.shape.moe, state.config.parallel.n_ranks
    assert eplb is not None and moe is not None, "experts are balanced where there are some"
    layers = list(moe.layers)
    if report is None:
        return ExpertPlaces(eplb.redundant, layers, [], 0, 0, 0, 1.0, 1.0)
    n_slots = len(report.slots_lp[0]) // n_ranks
    experts_lgs = [[slots[g * n_slots : (g + 1) * n_slots] for g in range(n_ranks)] for slots in report.slots_lp]
    n_done = report.n_checks_total, report.n_moved_total, report.pause_ms_total
    return ExpertPlaces(eplb.redundant, layers, experts_lgs, *n_done, report.before, report.after)
