"""How the engine cores of an expert-parallel group agree on each step: the rules, without sockets or clocks.

Every rank must enter the same collectives with the same sizes, also one that has no work. So a core that has planned a
step votes for it; the hub asks those who have not, gathers one vote from each, and tells all the same agreement. A core
hands its plan to its ranks only with the agreement in it, so all ranks see the same sequence of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy.wire.group import (
    Agreed,
    Alive,
    Complete,
    Dismissed,
    GroupCommand,
    GroupEvent,
    GroupFailed,
    Join,
    Leave,
    Missing,
    StepOpen,
    Vote,
)
from fastdeploy.wire.messages import GroupStore, StepAgreement

SILENCE_LIMIT_S = 6.0  # everyone speaks every second

Outbox = list[tuple[bytes, GroupEvent]]


def agree(
    votes: Sequence[Vote], graph_sizes: Sequence[int] = (), least_prompt_tokens: int | None = None
) -> StepAgreement:
    """The one value that all ranks act on; `votes` in the order of data-parallel ranks, `graph_sizes` ascending.

    The ranks wait for each other in every sparse layer, so the longest prompts of a step are what it costs all. Where
    several have prompts, none computes more of them than the one with the fewest, but `least_prompt_tokens` in any
    case; the rest is a matter of the next step. None: prompts are not cut.
    """
    prompts = [vote.n_prompt_tokens for vote in votes if vote.n_prompt_tokens]
    if least_prompt_tokens is None or len(prompts) < 2:
        n_tokens_d = [vote.n_tokens for vote in votes]
    else:
        most = max(min(prompts), least_prompt_tokens)
        n_tokens_d = [vote.n_tokens - max(vote.n_prompt_tokens - most, 0) for vote in votes]
    n_most = max(n_tokens_d)
    rearrange = any(vote.rearrange for vote in votes)
    size = next((size for size in graph_sizes if size >= n_most), None)
    if size is not None and n_most > 0 and all(vote.graph_ok for vote in votes):
        return StepAgreement(n_tokens_d, size, True, rearrange)
    return StepAgreement(n_tokens_d, n_most, False, rearrange)


class Hub:
    """Members, votes and the end of one group; each method returns what is to be sent, and to whom."""

    def __init__(
        self,
        n_members: int,
        fingerprint: str,
        graph_sizes: Sequence[int] = (),
        least_prompt_tokens: int | None = None,
    ) -> None:
        self._least_prompt_tokens = least_prompt_tokens
        self.failed: str | None = None
        self._fingerprint = fingerprint
        self._graph_sizes = graph_sizes
        self._member_d: list[bytes | None] = [None] * n_members
        self._heard_s: dict[bytes, float] = {}
        self._complete = False
        self._store: GroupStore | None = None
        self._step = 0
        self._vote_d: list[Vote | None] = [None] * n_members
        self._leaving: set[int] = set()

    def take(self, sender: bytes, command: GroupCommand, now_s: float) -> Outbox:
        """A member said something. A stranger is passed over, or told that the group it speaks of is gone."""
        if isinstance(command, Join):
            return self._join(sender, command, now_s)
        if self.failed:
            return []
        if sender not in self._heard_s:
            if isinstance(command, Vote | Alive):  # only members of a complete group say that
                return [(sender, GroupFailed("data-parallel rank 0 started anew: its engine core was gone"))]
            return []
        self._heard_s[sender] = now_s
        data_rank = self._member_d.index(sender)
        match command:
            case Vote():
                return self._vote(data_rank, command)
            case GroupStore():
                self._store = command
                return self._to_all(command) if self._complete else []
            case Leave(None):
                self._leaving.add(data_rank)
                return self._to_all(Dismissed()) if len(self._leaving) == len(self._member_d) else []
            case Leave(error):
                return self.end(f"data-parallel rank {data_rank}: {error}")
        return []

    def end(self, reason: str) -> Outbox:
        """The group cannot go on; the first reason counts."""
        return [] if self.failed else self._fail(reason)

    def tick(self, now_s: float) -> Outbox:
        """Called about once a second: notices who has gone silent."""
        if self.failed:
            return []
        silent = [sender for sender, heard_s in self._heard_s.items() if now_s - heard_s > SILENCE_LIMIT_S]
        if silent and self._complete:
            names = ", ".join(str(data_rank) for data_rank, m in enumerate(self._member_d) if m in silent)
            return self._fail(f"data-parallel rank {names} has been silent for {SILENCE_LIMIT_S:.0f} s")
        for sender in silent:
            self._forget(sender)
        return self._to_all(Alive() if self._complete else Missing(self.missing()))

    def missing(self) -> list[int]:
        """Data-parallel ranks that have not joined."""
        return [data_rank for data_rank, member in enumerate(self._member_d) if member is None]

    def _join(self, sender: bytes, join: Join, now_s: float) -> Outbox:
        n_members, data_rank = len(self._member_d), join.data_rank
        if join.fingerprint != self._fingerprint or not 0 <= data_rank < n_members:
            reason = (
                f"data-parallel rank {data_rank} was started with another model, other sizes or another version than "
                f"rank 0 (a group of {n_members}): give all servers the same command"
            )
            return [(sender, GroupFailed(reason))]
        before = self._member_d[data_rank]
        if sender == before:
            self._heard_s[sender] = now_s
            return []
        if self.failed:
            return []
        if self._complete:
            # Only a core whose predecessor is gone joins again. It keeps asking until the next hub is there.
            return self._fail(f"data-parallel rank {data_rank} started anew: its engine core was gone")
        if before is not None:
            self._forget(before)
        self._member_d[data_rank] = sender
        self._heard_s[sender] = now_s
        if self.missing():
            return []
        self._complete = True
        return self._to_all(Complete()) + (self._to_all(self._store) if self._store else [])

    def _vote(self, data_rank: int, vote: Vote) -> Outbox:
        if vote.step != self._step or self._vote_d[data_rank] is not None:
            return self._fail(
                f"data-parallel rank {data_rank} voted for step {vote.step}, the group is at {self._step}"
            )
        first = not any(self._vote_d)
        self._vote_d[data_rank] = vote
        votes = [v for v in self._vote_d if v is not None]
        if len(votes) == len(self._vote_d):
            agreed = Agreed(self._step, agree(votes, self._graph_sizes, self._least_prompt_tokens))
            self._step += 1
            self._vote_d = [None] * len(votes)
            return self._to_all(agreed)
        if not first:
            return []
        voter = self._member_d[data_rank]
        return [(m, StepOpen(self._step)) for m in self._member_d if m is not None and m != voter]

    def _fail(self, reason: str) -> Outbox:
        self.failed = reason
        return self._to_all(GroupFailed(reason))

    def _forget(self, member: bytes) -> None:
        del self._heard_s[member]
        self._member_d[self._member_d.index(member)] = None

    def _to_all(self, event: GroupEvent) -> Outbox:
        return [(member, event) for member in self._member_d if member is not None]
