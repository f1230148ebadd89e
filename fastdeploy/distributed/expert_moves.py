"""The weights of experts from the ranks that hold them to those that are to, in place and with little memory beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeploy.distributed.collectives import group_errors
from fastdeploy.distributed.expert_placement import STAGING_BYTES, Slots
from fastdeploy.distributed.groups import Group


@dataclass(frozen=True, slots=True)
class Moves:
    """What one rank does when the slots of a layer change; its slots are counted from 0.

    `sent_g[g]`: slots whose weights go to rank g. `taken_g[g]`: slots that get what rank g sends, in the order in which
    it does. `n_most`: weights that a rank sends and takes together, at most over all ranks.
    """

    sent_g: list[list[int]]
    taken_g: list[list[int]]
    n_most: int


def moves_of(before: Slots, after: Slots, n_ranks: int, rank: int) -> Moves:
    """What `rank` sends and takes. Those that hold an expert take turns in giving it."""
    n_slots = len(before) // n_ranks
    held: dict[int, list[int]] = {}
    for slot, expert in enumerate(before):
        held.setdefault(expert, []).append(slot)
    moves = Moves([[] for _ in range(n_ranks)], [[] for _ in range(n_ranks)], 0)
    n_of_rank = [0] * n_ranks
    for slot, expert in enumerate(after):
        if before[slot] == expert:
            continue
        givers = held[expert]
        source = next((s for s in givers if s // n_slots == slot // n_slots), givers[slot % len(givers)])
        giver, taker = source // n_slots, slot // n_slots
        n_of_rank[giver] += 1
        n_of_rank[taker] += 1
        if giver == rank:
            moves.sent_g[taker].append(source % n_slots)
        if taker == rank:
            moves.taken_g[giver].append(slot % n_slots)
    return Moves(moves.sent_g, moves.taken_g, max(n_of_rank))


def exchange(stacks: Sequence[Tensor], moves: Moves, group: Group, staging_bytes: int = STAGING_BYTES) -> None:
    """A collective of all ranks of the group: overwrite the slots of `stacks`, contiguous [slot, ...], as `moves` say.

    All slots change together, some bytes of each at a time, so that none is lost before it was sent. On a GPU nothing
    waits for the device. Raises EngineDeadError when a rank is gone.
    """
    if not moves.n_most:
        return
    assert group.everyone is not None, "a rank by itself exchanges nothing"
    device = stacks[0].device
    sent_s = torch.tensor([slot for slots in moves.sent_g for slot in slots], dtype=torch.int64).to(device)
    taken_s = torch.tensor([slot for slots in moves.taken_g for slot in slots], dtype=torch.int64).to(device)
    for stack in stacks:
        flat_sX = _in_words(stack)
        word = flat_sX.itemsize
        n_words = max(staging_bytes // word // moves.n_most, 1)
        for part_sX in flat_sX.split(n_words, 1):
            n_bytes = part_sX.shape[1] * word
            going = part_sX.index_select(0, sent_s)
            coming = going.new_empty(len(taken_s), part_sX.shape[1])
            with group_errors(group.name):
                group.everyone.alltoall_base(
                    coming.view(-1).view(torch.uint8),
                    going.view(-1).view(torch.uint8),
                    [len(slots) * n_bytes for slots in moves.taken_g],
                    [len(slots) * n_bytes for slots in moves.sent_g],
                ).wait()
            part_sX.index_copy_(0, taken_s, coming)


def _in_words(stack: Tensor) -> Tensor:
    """The same memory as [slot, words], in the widest type that fits."""
    flat_sB = stack.view(torch.uint8).view(stack.shape[0], -1)
    n_bytes = flat_sB.shape[1]
    return flat_sB.view(next(t for t in (torch.int64, torch.int32, torch.uint8) if n_bytes % t.itemsize == 0))
