"""One step, from the first grant to the plan that ranks get."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fastdeploy.engine.request import Request
from fastdeploy.wire.messages import SlotStart, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan for the ranks, and the request behind each of its grants."""

    plan: StepPlan
    requests: list[Request]


def is_decode(n_tokens: int, samples: bool) -> bool:
    """Whether a grant is the next token of a sequence rather than a piece of a prompt."""
    return samples and n_tokens == 1


def trimmed(planned: PlannedStep, n_tokens: int) -> PlannedStep:
    """The step with `n_tokens` tokens at most, which the ranks have not seen; what is cut off is planned again later.

    Prompts stand last in a plan, those that came last at its end: they lose their tokens first.
    """
    plan = planned.plan
    n_surplus = sum(plan.n_tokens) - n_tokens
    if n_surplus <= 0:
        return planned
    n_kept, samples = list(plan.n_tokens), list(plan.samples)
    for i in range(len(n_kept) - 1, -1, -1):
        n_cut = min(n_kept[i], n_surplus)
        if n_cut and planned.requests[i].alive:  # an aborted one has forgotten its plans
            planned.requests[i].take_back(n_cut, samples[i])
        n_kept[i] -= n_cut
        samples[i] = samples[i] and not n_cut
        n_surplus -= n_cut
        if not n_surplus:
            break
    kept = [i for i, n in enumerate(n_kept) if n]
    cut = msgspec.structs.replace(
        plan,
        slots=[plan.slots[i] for i in kept],
        n_tokens=[n_kept[i] for i in kept],
        samples=[samples[i] for i in kept],
        new_pages=[plan.new_pages[i] for i in kept],
    )
    return PlannedStep(cut, [planned.requests[i] for i in kept])


def gather_prompt_logprobs(planned: PlannedStep, result: StepResult) -> None:
    """Hand what a step found at prompt positions to the requests that asked for it."""
    for i, chunk in (result.prompt_logprobs or {}).items():
        request = planned.requests[i]
        if request.prompt_logprobs is not None and request.start_step <= result.step:
            request.prompt_logprobs += [position for position in chunk if position is not None]


class StepDraft:
    """A step being planned: its grants so far, what is left of the budget, and the prompts that it leaves midway."""

    __slots__ = (
        "budget",
        "midway",
        "n_long",
        "n_partial",
        "n_tokens",
        "new_pages",
        "prompts",
        "requests",
        "samples",
        "slots",
        "starts",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens
        self.starts: list[SlotStart] = []
        self.requests: list[Request] = []
        self.slots: list[int] = []
        self.n_tokens: list[int] = []
        self.samples: list[bool] = []
        self.new_pages: list[list[int]] = []
        self.midway: list[Request] = []  # running, more than one token lacking
        self.prompts: list[tuple[Request, int]] = []  # requests and their first share of the budget
        self.n_partial = 0  # of `prompts`, those that still lack tokens afterwards
        self.n_long = 0  # of `n_partial`, the long ones

    def take(self, request: Request, n_tokens: int, is_long: bool) -> None:
        """Set tokens of the budget aside for a prompt."""
        self.prompts.append((request, n_tokens))
        self.budget -= n_tokens
        if n_tokens < request.n_lacking:
            self.n_partial += 1
            self.n_long += is_long

    def finish(self, step: int, *, even_if_empty: bool) -> PlannedStep | None:
        """The plan with number `step`; None when nothing was granted, unless an empty one is wanted."""
        self._grant_prompts()
        if not self.slots and not even_if_empty:
            return None
        plan = StepPlan(step, self.starts, self.slots, self.n_tokens, self.samples, self.new_pages)
        return PlannedStep(plan, self.requests)

    def _grant_prompts(self) -> None:
        """Turn shares into grants. What no admission used of the budget goes to those left midway, first come first."""
        for request, n_share in self.prompts:
            n_more = min(self.budget, request.n_lacking - n_share)
            self.budget -= n_more
            self.requests.append(request)
            self.slots.append(request.slot)
            self.n_tokens.append(n_share + n_more)
            self.samples.append(request.grant(n_share + n_more))
            self.new_pages.append([])
