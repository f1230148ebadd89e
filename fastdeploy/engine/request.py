"""One request inside the engine core: its tokens, its place on the ranks, and how far it has got."""

from __future__ import annotations

from fastdeploy.engine.prefix_cache import PageNames
from fastdeploy.wire.messages import FinishReason, RequestTimes, SlotStart, Submit, TokenDelta, TokenLogprobs

NEVER = 1 << 62  # a token count that no request reaches


class Request:
    """State of a request that has not ended. Only the scheduler writes to it.

    Positions count from 0 at the first prompt token. `n_computed <= n_planned <= n_target < n_limit` while it is
    resident (has a slot and pages); `n_target - n_planned` is what it lacks. In `n_target`, tokens being sampled by
    steps in flight (placeholders) count like known ones; the token that ends the request does not, as it is never fed
    back.
    """

    __slots__ = (
        "alive",
        "arrival",
        "client",
        "first_offered",
        "first_scheduled_s",
        "first_token_s",
        "id",
        "last_token_s",
        "n_cached_tokens",
        "n_capacity",
        "n_computed",
        "n_in_flight",
        "n_limit",
        "n_offered",
        "n_planned",
        "n_prompt",
        "n_registered",
        "n_starts",
        "n_stop_from",
        "n_target",
        "names",
        "page_tokens",
        "pages",
        "pairing",
        "params",
        "prompt_logprobs",
        "queued_s",
        "received_s",
        "register_at",
        "slot",
        "start_step",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        submit: Submit,
        client: bytes,
        *,
        arrival: int,
        n_limit: int,
        eos_token_ids: tuple[int, ...],
        page_tokens: int,
        now_s: float,
    ) -> None:
        """`arrival` numbers requests in the order they came; `n_limit` bounds its tokens, prompt included."""
        params = submit.params
        self.id = submit.request_id
        self.client = client  # front end that gets the answer
        self.params = params
        self.pairing = submit.pairing  # None as well once it is known that all of it is computed here
        self.arrival = arrival
        self.token_ids = submit.prompt_ids + submit.output_ids  # prompt, then output known so far
        self.n_prompt = len(submit.prompt_ids)
        self.n_limit = n_limit
        self.stop_ids = frozenset(() if params.ignore_eos else eos_token_ids) | frozenset(params.stop_token_ids or ())
        self.n_stop_from = self.n_prompt + params.min_tokens  # with fewer tokens a stop token does not end it
        self.names = PageNames(self.token_ids, page_tokens)
        self.page_tokens = page_tokens
        self.alive = True

        self.n_target = len(self.token_ids)
        self.n_planned = 0  # positions computed by the steps planned in this residency, or found in the prefix cache
        self.n_computed = 0  # the same for committed steps; meaningless without a slot
        self.n_in_flight = 0  # tokens that planned steps sample, not committed yet
        self.slot = -1  # -1: waits
        self.start_step = -1  # the step that began the newest residency; earlier ones say nothing about its pages
        self.n_starts = 0
        self.pages: list[int] = []
        self.n_capacity = 0  # positions that `pages` have room for
        self.n_registered = 0  # leading pages that have been offered to the prefix cache
        self.register_at = NEVER  # n_computed from which the next page to offer is full

        self.first_offered = 0  # of a prompt computed for another server: the first page that it wants
        self.n_offered = 0  # leading pages offered to it in this residency, or not wanted

        self.n_cached_tokens = 0  # prompt tokens found in the prefix cache at the first start
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None  # gathered until the first token
        self.queued_s = now_s
        self.received_s = submit.arrival_s
        self.first_scheduled_s = 0.0
        self.first_token_s = 0.0
        self.last_token_s = 0.0

    @property
    def n_lacking(self) -> int:
        """Positions that can be computed and are in no plan yet."""
        return self.n_target - self.n_planned

    @property
    def times(self) -> RequestTimes:
        """When it passed each stage so far."""
        return RequestTimes(self.received_s, self.first_scheduled_s, self.first_token_s, self.last_token_s)

    def start(self, slot: int, step: int, cached: list[int], new: list[int], now_s: float) -> SlotStart:
        """Become resident with step `step`: pages from the prefix cache, and new ones for the other known tokens."""
        self.n_starts += 1
        self.slot = slot
        self.start_step = step
        self.pages = cached + new
        self.n_capacity = len(self.pages) * self.page_tokens
        self.n_planned = self.n_computed = len(cached) * self.page_tokens
        self.n_registered = len(cached)
        self.n_offered = self.first_offered
        if self.n_starts == 1:
            self.first_scheduled_s = now_s
            self.n_cached_tokens = self.n_planned
        if self.params.prompt_logprobs is not None and len(self.token_ids) == self.n_prompt:
            self.prompt_logprobs = [None]  # nothing comes before position 0
        return self._slot_start()

    def resume(self, step: int) -> SlotStart:
        """Its prompt was computed elsewhere and the pages are filled: decode from step `step` on."""
        self.pairing = None
        self.start_step = step
        self.n_planned = self.n_computed = self.n_prompt
        return self._slot_start()

    def _slot_start(self) -> SlotStart:
        return SlotStart(
            slot=self.slot,
            token_ids=list(self.token_ids),
            n_prompt_tokens=self.n_prompt,
            n_computed=self.n_planned,
            page_ids=list(self.pages),
            params=self.params,
        )

    @property
    def awaits_pages(self) -> bool:
        """Whether another server computes its prompt."""
        return self.pairing is not None and self.pairing.role == "decode"

    @property
    def lends_pages(self) -> bool:
        """Whether its prompt is computed for another server."""
        return self.pairing is not None and self.pairing.role == "prefill"

    def take_first(self, token_id: int, now_s: float) -> None:
        """The first token of the answer, sampled elsewhere."""
        self.token_ids.append(token_id)
        self.n_target = self.n_prompt + 1
        self.first_token_s = self.last_token_s = now_s

    def end_reason(self) -> FinishReason | None:
        """Why its newest token is its last, if it is."""
        n_known = len(self.token_ids)
        if self.token_ids[-1] in self.stop_ids and n_known >= self.n_stop_from:
            return "stop"
        return "length" if n_known >= self.n_limit else None

    def leave(self) -> None:
        """Give up slot and pages, which the caller has taken back."""
        self.slot = -1
        self.pages = []
        self.n_capacity = self.n_planned = 0
        self.register_at = NEVER

    def grant(self, n_tokens: int) -> bool:
        """Plan the next `n_tokens` positions; True when the last of them is sampled, which adds a placeholder."""
        self.n_planned += n_tokens
        if self.n_planned < self.n_target:
            return False
        self.n_in_flight += 1
        if self.n_target + 1 < self.n_limit:
            self.n_target += 1
        return True

    def take_back(self, n_tokens: int, sampled: bool) -> None:
        """Undo the newest `n_tokens` positions of a grant that no rank has seen, and with them its sample."""
        if sampled:
            self.n_in_flight -= 1
            self.n_target = self.n_planned
        self.n_planned -= n_tokens

    def last_delta(self, reason: FinishReason, error: str | None = None, error_kind: str | None = None) -> TokenDelta:
        """Ends it without a token; `error_kind` is the class in `fastdeploy.errors` that the client is to see."""
        return TokenDelta(
            self.id, [], reason, None, self.n_cached_tokens, error=error, times=self.times, error_kind=error_kind
        )

    def delta(self, token_id: int, reason: FinishReason | None, logprobs: TokenLogprobs | None) -> TokenDelta:
        """What its newest token, already in `token_ids`, adds; with everything that only some tokens carry."""
        first = len(self.token_ids) == self.n_prompt + 1
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return TokenDelta(
            request_id=self.id,
            token_ids=[token_id],
            finish_reason=reason,
            stop_token_id=token_id if reason == "stop" else None,
            n_cached_tokens=self.n_cached_tokens,
            logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=prompt_logprobs if first else None,
            times=self.times if first or reason else None,
        )
