"""What the next step computes, and what came of it: the only writer of requests and pages. No torch, clock or socket.

`plan` may run several steps ahead of `commit`: a token that is not known yet is a placeholder, which the rank fills in
itself. Plans are committed in the order in which they were made, and ranks work in that order, so a page or slot given
back can be given out by the next plan, whatever steps in flight still do to it.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import TypeAlias

from fastdeploy.config.schema import EngineConfig
from fastdeploy.engine.checks import check_limits, check_prompt
from fastdeploy.engine.disaggregation import PairedRequests
from fastdeploy.engine.pages import PagePool
from fastdeploy.engine.request import NEVER, Request
from fastdeploy.engine.reuse import PrefixReuse
from fastdeploy.engine.step import PlannedStep, StepDraft, gather_prompt_logprobs
from fastdeploy.engine.waiting import WaitingRoom, by_arrival
from fastdeploy.errors import EngineError, InvalidRequest, Overloaded, RequestTimeout
from fastdeploy.wire.messages import (
    FinishReason,
    PairingStatus,
    SlotStart,
    Status,
    StepResult,
    Submit,
    TokenDelta,
    TokenLogprobs,
)

Deltas: TypeAlias = dict[bytes, list[TokenDelta]]  # per front end


class Scheduler:
    """Continuous batching of one engine core.

    Running requests are served first, those that lack one token before the others; then waiting ones are admitted in
    the order they came. A request takes the pages for all its known tokens when it is admitted and one more at a time
    as it grows. When none is left, the running request that came last gives its pages back and waits again, before all
    that never ran. `pool` is public to be looked at.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Raises ConfigError when the page count is unknown or the limits of a step would stall a request for ever."""
        limits, cache, n_pages = config.scheduler, config.cache, check_limits(config)
        self._config = config
        self._limits = limits
        self._page_tokens = cache.page_tokens
        self._max_partial = limits.max_partial_prefills if limits.chunked_prefill else 0
        self._long_tokens = limits.long_prefill_tokens or NEVER
        self.pool = PagePool(n_pages)
        self.paired = PairedRequests(self.pool)
        self._reuse = PrefixReuse(self.pool, cache)

        self._requests: dict[str, Request] = {}  # all that have not ended
        self._running: list[Request] = []  # in order of arrival
        self._waiting = WaitingRoom()
        self._free_slots = list(range(limits.max_seqs - 1, -1, -1))
        self._n_arrived = 0
        self._n_planned_steps = 0
        self._n_steps = 0
        self._n_preempted = 0
        self._n_prompt_tokens = 0
        self._n_cached_tokens = 0
        self._n_generated_tokens = 0

    # ---- requests come and go ------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True when there is no request that has not ended; steps in flight may still have to be committed."""
        return not self._requests

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def submit(self, submit: Submit, client: bytes, now_s: float) -> None:
        """Queue a request. Raises InvalidRequest, ContextTooLong or Overloaded when it is refused."""
        self._check(submit)
        n_prompt, max_tokens = len(submit.prompt_ids), submit.params.max_tokens
        lends = submit.pairing is not None and submit.pairing.role == "prefill"
        if lends:
            max_tokens = 1  # the decode server goes on from there
        max_model_len, n_room = self._config.model.max_model_len, self.pool.n_pages * self._page_tokens
        request = Request(
            submit,
            client,
            arrival=self._n_arrived,
            # The last token is not fed back, so it needs no room in a page.
            n_limit=min(max_model_len, n_room + 1, n_prompt + (max_model_len if max_tokens is None else max_tokens)),
            eos_token_ids=self._config.model.eos_token_ids,
            page_tokens=self._page_tokens,
            now_s=now_s,
        )
        self._n_arrived += 1
        self._requests[request.id] = request
        if lends:
            self.paired.unwanted[request.id] = request
        else:
            self._waiting.put(request)

    def _check(self, submit: Submit) -> None:
        if submit.request_id in self._requests or self.paired.is_lent(submit.request_id):
            raise InvalidRequest(
                f"request_id {submit.request_id!r} is in use by a request that has not ended", "request_id"
            )
        check_prompt(submit, self._config, self.pool.n_pages)
        max_waiting = self._limits.max_waiting
        if 0 < max_waiting <= self.n_waiting:
            raise Overloaded(
                f"{self.n_waiting} requests are waiting, --scheduler-max-size allows {max_waiting}: try later"
            )

    def abort(self, request_ids: Iterable[str]) -> Deltas:
        """End these requests with reason "abort"; ids of requests that have ended, or never were, are passed over."""
        doomed = [request for i in request_ids if (request := self._requests.get(i)) is not None]
        return self._end(dict.fromkeys(doomed), "abort")

    def withdraw(self, client: bytes, n_requests: int) -> list[str]:
        """Forget up to `n_requests` requests of a front end that never ran, newest first; returns their ids."""
        fresh = [r for r in self._waiting if r.client == client and r.n_starts == 0 and not r.lends_pages]
        newest = fresh[-n_requests:] if n_requests > 0 else []
        for request in newest:
            self._forget(request)
        return [request.id for request in newest]

    def drop_client(self, client: bytes) -> None:
        """Forget all requests of a front end that is gone."""
        self.abort([request.id for request in self._requests.values() if request.client == client])

    def expire(self, now_s: float) -> Deltas:
        """End requests that have waited longer than they may without ever running."""
        ttl_s = self._limits.waiting_ttl_s
        error = (
            f"the request waited longer than {ttl_s:g} s (--scheduler-ttl) and was given up: the server is overloaded"
        )
        return self._end(self._waiting.overdue(now_s - ttl_s), "error", error, RequestTimeout.__name__)

    # ---- for the rules of requests that two servers compute; see engine/disaggregation.py --------------------------

    def find(self, request_id: str) -> Request | None:
        """The request with this id, unless it has ended."""
        return self._requests.get(request_id)

    def fail(self, request: Request, error: str) -> Deltas:
        """End a request with an error: what it waits for does not come."""
        return self._end([request], "error", error, RequestTimeout.__name__)

    def wait(self, request: Request) -> None:
        """Let a request wait until it is computed here; what it has of slot and pages is given back."""
        if request.slot >= 0:
            self._leave_rank(request)
        self._waiting.put(request)

    def first_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now_s: float) -> Deltas:
        """The first token of a request that awaits pages, sampled elsewhere."""
        request.take_first(token_id, now_s)
        self._n_generated_tokens += 1
        reason = request.end_reason()
        delta = request.delta(token_id, reason, logprobs)
        if reason:
            self._forget(request)
        return {request.client: [delta]}

    # ---- plan ----------------------------------------------------------------------------------------------------

    def plan(self, now_s: float, *, even_if_empty: bool = False) -> PlannedStep | None:
        """The next step; None when nothing can be computed before another commit or request.

        All requests together get at most `max_batched_tokens` tokens. With `even_if_empty` there is a step in any case,
        without grants if need be: other ranks of the group have work.
        """
        draft = StepDraft(self._limits.max_batched_tokens)
        for request in self.paired.filled:
            draft.starts.append(request.resume(self._n_planned_steps))
            self._reuse.set_register_at(request)
            insort(self._running, request, key=by_arrival)
        self.paired.filled.clear()
        self._grant_decodes(draft)
        for request in draft.midway:
            if draft.budget:
                draft.take(request, self._share(draft, request.n_lacking), self._is_long(request))
        if self._free_slots and draft.budget and self._waiting:
            self._admit(draft, now_s)
        planned = draft.finish(self._n_planned_steps, even_if_empty=even_if_empty)
        self._n_planned_steps += planned is not None
        return planned

    def _grant_decodes(self, draft: StepDraft) -> None:
        """One token for each running request that lacks one; `max_seqs` of them never exceed the budget.

        This is the hot loop of a loaded server, which is why it repeats `Request.grant`.
        """
        running, page_tokens, no_pages = self._running, self._page_tokens, list[int]()
        requests, slots, new_pages = draft.requests, draft.slots, draft.new_pages
        for request in running:  # preemption takes from its end only
            n_planned = request.n_planned
            n_target = request.n_target
            if n_target - n_planned != 1:
                if n_target > n_planned:
                    draft.midway.append(request)
                continue
            pages = no_pages
            if n_planned == request.n_capacity:
                pages = self._one_page(request)
                if not pages:
                    break
                request.pages += pages
                request.n_capacity += page_tokens
            requests.append(request)
            slots.append(request.slot)
            new_pages.append(pages)
            request.n_planned = n_target
            request.n_in_flight += 1
            if n_target + 1 < request.n_limit:
                request.n_target = n_target + 1
        draft.n_tokens = [1] * len(slots)
        draft.samples = [True] * len(slots)
        draft.budget -= len(slots)

    def _one_page(self, request: Request) -> list[int]:
        """One page, taken from the requests that came last if need be; none when `request` itself came last."""
        while (pages := self.pool.allocate(1)) is None:
            victim = self._running.pop()
            self.wait(victim)
            self._n_preempted += 1
            if victim is request:
                return []
        return pages

    def _is_long(self, request: Request) -> bool:
        return request.n_target > self._long_tokens

    def _share(self, draft: StepDraft, n_lacking: int) -> int:
        """Tokens for a prompt now: an equal part of what is left for each prompt that may still be left midway.

        Rounded up, so that a later prompt never gets a larger part than an earlier one.
        """
        n_sharing = max(1, self._max_partial - draft.n_partial)
        return min(n_lacking, -(-draft.budget // n_sharing))

    def _admit(self, draft: StepDraft, now_s: float) -> None:
        """Start waiting requests, in order, until one does not fit; only the limit on long prompts skips over one."""
        # A copy, as admission changes the queue; short, lest a queue of many long prompts be searched in every step.
        for request in list(islice(self._waiting, self._limits.max_seqs)):
            # Preempted with samples in flight: its own newest tokens are not known yet.
            if not self._free_slots or not draft.budget or request.n_in_flight:
                break
            cached = self._reuse.find(request)
            if request.awaits_pages:  # costs this step nothing; one more token, lest it be preempted at once
                if not self._start(request, cached, request.n_target + 1, now_s):
                    break
                self.paired.awaiting[request.id] = request
                self.paired.reserved.append(request)
                continue
            n_lacking = request.n_target - len(cached) * self._page_tokens
            n_share, is_long = self._share(draft, n_lacking), self._is_long(request)
            if n_share < n_lacking:
                if draft.n_partial >= self._max_partial:
                    break
                if is_long and draft.n_long >= self._limits.max_long_partial_prefills:
                    continue
            start = self._start(request, cached, request.n_target, now_s)
            if start is None:
                break
            draft.starts.append(start)
            draft.take(request, n_share, is_long)
            insort(self._running, request, key=by_arrival)

    def _start(self, request: Request, cached: list[int], n_tokens: int, now_s: float) -> SlotStart | None:
        """Give a request a slot and pages for `n_tokens` tokens; None, and no change, when there are too few pages.

        Beside others it must leave a page for each to grow into, lest it be preempted at once. Alone it may take all.
        """
        n_new = -(-n_tokens // self._page_tokens) - len(cached)
        n_reserved = len(self._running) + 1 if self._running else 0
        if n_new + n_reserved > self.pool.n_available - self.pool.n_unheld(cached):
            return None
        self._waiting.remove(request)
        self.pool.hold(cached)
        new = self.pool.allocate(n_new)
        assert new is not None, "pages counted as available are not"
        start = request.start(self._free_slots.pop(), self._n_planned_steps, cached, new, now_s)
        self._reuse.set_register_at(request)
        if request.n_starts == 1:
            self._n_prompt_tokens += request.n_prompt
            self._n_cached_tokens += request.n_cached_tokens
        return start

    # ---- commit --------------------------------------------------------------------------------------------------

    def commit(self, planned: PlannedStep, result: StepResult, now_s: float) -> Deltas:
        """Take in what a step sampled. Raises EngineError when the result is not that of the oldest step in flight."""
        plan, requests = planned.plan, planned.requests
        if not (result.step == plan.step == self._n_steps and len(result.token_ids) == len(requests)):
            raise EngineError(
                f"the ranks answered step {result.step} with {len(result.token_ids)} tokens; "
                f"expected was step {self._n_steps} with {len(requests)}"
            )
        step, n_sampled, some_ended = plan.step, 0, False
        outputs: defaultdict[bytes, list[TokenDelta]] = defaultdict(list)
        self._n_steps += 1
        gather_prompt_logprobs(planned, result)
        all_logprobs = result.logprobs or [None] * len(requests)
        for request, n_tokens, samples, token_id, logprobs in zip(
            requests, plan.n_tokens, plan.samples, result.token_ids, all_logprobs, strict=True
        ):
            if not request.alive:
                continue  # it ended while this step was in flight
            if request.start_step <= step:
                n_computed = request.n_computed = request.n_computed + n_tokens
                if n_computed >= request.register_at:
                    self._reuse.register(request)
            if not samples:
                continue
            n_sampled += 1
            token_ids = request.token_ids
            token_ids.append(token_id)
            request.n_in_flight -= 1
            request.last_token_s = now_s
            n_known = len(token_ids)
            reason: FinishReason | None = None
            if token_id in request.stop_ids and n_known >= request.n_stop_from:
                reason = "stop"
            elif n_known >= request.n_limit:
                reason = "length"
            first = n_known == request.n_prompt + 1
            if first:
                request.first_token_s = now_s
            if reason or first or logprobs is not None:
                delta = request.delta(token_id, reason, logprobs)
            else:
                delta = TokenDelta(request.id, [token_id], None, None, request.n_cached_tokens)
            outputs[request.client].append(delta)
            if reason:
                some_ended = True
                self._forget(request)
        self._n_generated_tokens += n_sampled
        if some_ended:
            self._running = [request for request in self._running if request.alive]
        return dict(outputs)

    # ---- the end of a request ------------------------------------------------------------------------------------

    def _end(
        self, doomed: Iterable[Request], reason: FinishReason, error: str | None = None, error_kind: str | None = None
    ) -> Deltas:
        outputs = Deltas()
        for request in doomed:
            outputs.setdefault(request.client, []).append(request.last_delta(reason, error, error_kind))
            self._forget(request)
        self._running = [request for request in self._running if request.alive]
        return outputs

    def _forget(self, request: Request) -> None:
        """Give back all that an ended request has; the caller takes it out of `_running`."""
        request.alive = False
        del self._requests[request.id]
        if request.slot >= 0:
            self._leave_rank(request)
        elif self.paired.unwanted.pop(request.id, None) is None:
            self._waiting.remove(request)

    def _leave_rank(self, request: Request) -> None:
        self.pool.release(self.paired.leave(request))
        self._free_slots.append(request.slot)
        request.leave()

    def status(self, stalled_s: float = 0.0, n_rows_of_expert: dict[int, int] | None = None) -> Status:
        """Counters and gauges; O(requests)."""
        n_tokens = sum(len(request.token_ids) for request in self._requests.values())
        n_running_tokens = sum(len(request.token_ids) for request in self._running)
        return Status(
            n_running=len(self._running),
            n_waiting=self.n_waiting,
            n_preempted_total=self._n_preempted,
            n_pages_free=self.pool.n_free,
            n_pages_cached=self.pool.n_cached,
            n_pages_total=self.pool.n_pages,
            n_prompt_tokens_total=self._n_prompt_tokens,
            n_cached_tokens_total=self._n_cached_tokens,
            n_generated_tokens_total=self._n_generated_tokens,
            n_steps_total=self._n_steps,
            n_running_tokens=n_running_tokens,
            n_waiting_tokens=n_tokens - n_running_tokens,
            stalled_s=stalled_s,
            n_rows_of_expert=n_rows_of_expert or {},
            pairing=PairingStatus(len(self.paired.awaiting), self.paired.n_lent_pages),
        )
