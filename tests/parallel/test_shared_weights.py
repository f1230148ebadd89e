"""Ranks of one machine that hold equal weights keep them once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import rank_calls
from rank_processes import RankProcesses, State

from fastdeploy.config.schema import ParallelConfig

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.timeout(120)
TWO = ParallelConfig(data=2, expert=True)
LENGTHS = (3, 1 << 20, 0, 17)


def keep(state: State, number: int, meeting: rank_calls.Meeting, inode_offset: int) -> dict[str, Any]:
    """Keep some weights as rank `number` does; what became of them."""
    import torch

    from fastdeploy.distributed import groups, shared_weights

    if "store" not in state:
        state["store"] = groups.reach_store(number, *meeting, 60)
    fstat = os.fstat
    moved = {"side_effect": lambda fd: _moved(fstat(fd), inode_offset)}
    with mock.patch("os.fstat", **moved):  # with an offset: as where the same numbers are those of other processes
        memory = shared_weights.weight_memory(TWO, number, lambda: state["store"])
    made = []

    def make(i: int) -> Tensor:
        made.append(i)
        return torch.arange(LENGTHS[i]).to(torch.bfloat16 if i % 2 else torch.float32).view(1, -1)

    kept = [memory.keep(lambda i=i: make(i)) for i in range(len(LENGTHS))]
    state["kept"] = memory, kept
    right = all(torch.equal(tensor, make(i)) for i, tensor in enumerate(kept))
    shared = [line for line in Path("/proc/self/maps").read_text().splitlines() if "fastdeploy-weights" in line]
    return {
        "kind": type(memory).__name__,
        "made": made[: -len(LENGTHS)],
        "right": right,
        "rights": [line.split()[1] for line in shared],
        "borrowed": memory.borrowed_bytes,
    }


def _moved(stat: os.stat_result, offset: int) -> os.stat_result:
    return os.stat_result((stat.st_mode, stat.st_ino + offset, *stat[2:]))


def test_one_rank_makes_what_both_keep(ranks: RankProcesses) -> None:
    meetings = rank_calls.meet(ranks, TWO)
    lender, borrower = ranks.call(keep, [(number, meetings[number], 0) for number in range(2)])
    assert lender["right"]
    assert borrower["right"]
    assert (lender["kind"], lender["made"], lender["borrowed"]) == ("LentMemory", [0, 1, 2, 3], 0)
    n_bytes = sum(n * (2 if i % 2 else 4) for i, n in enumerate(LENGTHS))
    assert (borrower["kind"], borrower["made"], borrower["borrowed"]) == ("BorrowedMemory", [], n_bytes)
    assert borrower["rights"][-1] == "r--s"


def test_a_rank_that_cannot_reach_the_other_keeps_its_own(ranks: RankProcesses) -> None:
    meetings = rank_calls.meet(ranks, TWO)
    _, other = ranks.call(keep, [(number, meetings[number], number) for number in range(2)])
    assert (other["kind"], other["made"], other["right"]) == ("OwnMemory", [0, 1, 2, 3], True)
