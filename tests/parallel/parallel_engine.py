"""Steps over several ranks, planned by hand: every request has its pages from the start and is never preempted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import rank_calls
from engine_harness import engine_config
from msgspec.structs import replace as replace_struct
from rank_processes import RankProcesses

from fastdeploy.config.schema import EplbConfig, ParallelConfig
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import SlotStart, StepAgreement, StepPlan

PAGE_TOKENS = 8
MAX_MODEL_LEN = 64
MAX_SEQS = 4
N_PAGES_PER_SLOT = MAX_MODEL_LEN // PAGE_TOKENS
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0).resolved({}, 8)


@dataclass
class Request:
    """A prompt that comes at step `arrives_at` and wants `n_wanted` tokens."""

    prompt_ids: list[int]
    n_wanted: int
    arrives_at: int = 0
    output_ids: list[int] = field(default_factory=list)
    n_computed: int = 0

    @property
    def n_known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_done(self) -> bool:
        return len(self.output_ids) == self.n_wanted


class Replica:
    """The requests of one data-parallel rank, one per slot; prompts are cut into chunks at random."""

    def __init__(self, requests: Sequence[Request], seed: int) -> None:
        assert len(requests) <= MAX_SEQS
        self.requests = list(requests)
        self._random = random.Random(seed)
        self._granted: list[Request] = []

    @property
    def is_done(self) -> bool:
        return all(request.is_done for request in self.requests)

    def plan(self, step: int) -> StepPlan:
        """What to compute in `step`, maybe nothing."""
        plan = StepPlan(step, [], [], [], [], [])
        self._granted = []
        for slot, request in enumerate(self.requests):
            if request.is_done or step < request.arrives_at:
                continue
            if request.n_computed == 0 and not request.output_ids:
                pages = list(range(slot * N_PAGES_PER_SLOT, (slot + 1) * N_PAGES_PER_SLOT))
                prompt = request.prompt_ids
                plan.starts.append(SlotStart(slot, prompt, len(prompt), 0, pages, GREEDY))
            n_lacking = request.n_known - request.n_computed
            n_tokens = self._random.randint(1, n_lacking)
            request.n_computed += n_tokens
            plan.slots.append(slot)
            plan.n_tokens.append(n_tokens)
            plan.samples.append(n_tokens == n_lacking)
            plan.new_pages.append([])
            self._granted.append(request)
        # A request that starts computes at least one token, so it never starts twice.
        return plan

    def take(self, token_ids: Sequence[int]) -> None:
        """The tokens that the planned step sampled."""
        for request, token_id in zip(self._granted, token_ids, strict=True):
            if token_id >= 0:
                request.output_ids.append(token_id)


class ParallelEngine:
    """A model over the first `parallel.n_ranks` rank processes."""

    def __init__(
        self,
        ranks: RankProcesses,
        folder: Path,
        parallel: ParallelConfig,
        exchange: str | None = None,
        *,
        eplb: EplbConfig | None = None,
        rearrange_every: int = 0,
        random_seed: int | None = None,
    ) -> None:
        """With `eplb` every so many steps begin with a rearrangement of experts; 0 is never.

        `random_seed`: of weights made up for the config.json in `folder`; None takes those in the folder.
        """
        self.rearrange_every = rearrange_every
        self.ranks = ranks
        self.parallel = parallel
        base = engine_config(
            folder,
            max_model_len=MAX_MODEL_LEN,
            page_tokens=PAGE_TOKENS,
            n_pages=MAX_SEQS * N_PAGES_PER_SLOT,
            max_seqs=MAX_SEQS,
        )
        if random_seed is not None:
            base = replace(base, model=replace(base.model, random_weights=True, seed=random_seed))
        meetings = rank_calls.meet(ranks, parallel)
        arguments = []
        for number, meeting in enumerate(meetings):
            config = replace(base, eplb=eplb, parallel=replace(parallel, data_rank=number // parallel.tensor))
            arguments.append((config, number, meeting, exchange))
        built = ranks.call(rank_calls.build, arguments)
        self.weight_bytes = [n_bytes for n_bytes, _ in built]

    def generate(self, requests_d: Sequence[Sequence[Request]], seed: int = 0) -> list[list[list[int]]]:
        """Serve the requests of each data-parallel rank; returns the output of each."""
        replicas = [Replica(requests, seed + d) for d, requests in enumerate(requests_d)]
        assert len(replicas) == self.parallel.data
        for step in range(1000):
            if all(replica.is_done for replica in replicas):
                return [[request.output_ids for request in replica.requests] for replica in replicas]
            rearrange = self.rearrange_every > 0 and step % self.rearrange_every == self.rearrange_every - 1
            self._step([replica.plan(step) for replica in replicas], replicas, rearrange=rearrange)
        raise AssertionError("requests do not end")

    def _step(self, plans: list[StepPlan], replicas: Sequence[Replica], *, rearrange: bool) -> None:
        n_tensor = self.parallel.tensor
        if rearrange or (self.parallel.expert and self.parallel.data > 1):
            n_tokens_d = [sum(plan.n_tokens) for plan in plans]
            agreement = StepAgreement(n_tokens_d, max(n_tokens_d), False, rearrange)
            plans = [replace_struct(plan, agreement=agreement) for plan in plans]
            results = self.ranks.call(rank_calls.step, [(plans[i // n_tensor],) for i in range(self.parallel.n_ranks)])
        else:  # a replica by itself takes no empty step
            busy = [d for d, plan in enumerate(plans) if plan.slots]
            numbers = [d * n_tensor + part for d in busy for part in range(n_tensor)]
            for number in numbers:
                self.ranks.send(number, rank_calls.step, plans[number // n_tensor])
            found = {number: self.ranks.result(number) for number in numbers}
            assert all(ok for ok, _ in found.values()), found
            results = [found[number][1] if number in found else None for number in range(self.parallel.n_ranks)]
        for d, replica in enumerate(replicas):
            of_replica = results[d * n_tensor : (d + 1) * n_tensor]
            if of_replica[0] is not None:
                assert all(result.token_ids == of_replica[0].token_ids for result in of_replica)
                replica.take(of_replica[0].token_ids)
