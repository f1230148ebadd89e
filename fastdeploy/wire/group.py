"""What engine cores of one expert-parallel group and its hub say to each other; see engine/group.py."""

from __future__ import annotations

from typing import TypeAlias

from fastdeploy.wire.messages import GroupStore, Message, StepAgreement


class Join(Message, frozen=True):
    """A core wants to be `data_rank` of the group; repeated until the group is complete."""

    data_rank: int
    fingerprint: str  # of what must be equal on all ranks


class Vote(Message, frozen=True):
    """What a core would compute in step `step` of the group."""

    step: int
    n_tokens: int
    graph_ok: bool
    n_prompt_tokens: int = 0  # of these, tokens of prompts, of which it would also take fewer
    rearrange: bool = False  # before it, experts should be put where they should lie


class Alive(Message, frozen=True):
    """Said every second, both ways."""


class Leave(Message, frozen=True):
    """A core is done: it takes part in others' steps until all want to leave. With `error` it has failed."""

    error: str | None = None


class Complete(Message, frozen=True):
    """All cores of the group are there."""


class Missing(Message, frozen=True):
    """The group is not complete yet: these data-parallel ranks are awaited."""

    data_ranks: list[int]


class StepOpen(Message, frozen=True):
    """A core has work for step `step`: vote."""

    step: int


class Agreed(Message, frozen=True):
    """All have voted for step `step`."""

    step: int
    agreement: StepAgreement


class GroupFailed(Message, frozen=True):
    """The group has come to an end, and why."""

    reason: str


class Dismissed(Message, frozen=True):
    """All cores want to leave: stop."""


GroupCommand: TypeAlias = Join | GroupStore | Vote | Alive | Leave
GroupEvent: TypeAlias = Missing | Complete | GroupStore | StepOpen | Agreed | Alive | GroupFailed | Dismissed
