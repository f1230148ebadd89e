"""Decode side of requests that two servers compute: asks for pages, has them read, and decides when to give up.

No sockets and no clock: the core calls in with what arrived and sends what is in the outboxes. Whatever goes wrong, the
request is computed here from its prompt (and first token, if that came), once nothing writes into its pages any more.
"""

from __future__ import annotations

import logging
from collections import Counter
from itertools import count
from typing import TypeAlias

from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import Deltas, Scheduler
from fastdeploy.errors import LayoutMismatch
from fastdeploy.transfer.base import Endpoint
from fastdeploy.transfer.layout import source_ranks
from fastdeploy.wire.control import (
    Accepted,
    FirstToken,
    Offer,
    OfferEvent,
    Ranks,
    Refused,
    Release,
    StillHere,
    Want,
    WantCommand,
    WhoIsThere,
    prompt_hash,
)
from fastdeploy.wire.messages import CancelPull, ForgetPulls, PairingStatus, PullEnded, PullPages, TransferCommand

SILENCE_LIMIT_S = 6.0  # everyone speaks every second
ANSWER_LIMIT_S = 10.0  # until the prefill server has the request too
FETCH_LIMIT_S = 60.0  # from the first word of the prefill server to the last page
PULL_LIMIT_S = 20.0

Address: TypeAlias = tuple[str, int]

log = logging.getLogger("fastdeploy.pairing")


class _Fetch:
    """One request whose pages come from elsewhere."""

    def __init__(self, request: Request, now_s: float) -> None:
        assert request.pairing is not None
        self.request = request
        self.named: Address = (request.pairing.host, request.pairing.port)
        self.asked: set[Address] = set()
        self.home: Address | None = None  # who has the request
        self.since_s = self.reserved_s = now_s
        self.first_page = request.n_planned // request.page_tokens
        self.page_ids = request.pages[: -(-request.n_prompt // request.page_tokens)]
        self.endpoints: list[Endpoint] = []
        self.sources: list[list[int]] = []  # by rank here: which ranks there it reads from
        self.generation: int | None = None
        self.offers: set[tuple[int, int, int]] = set()
        self.n_left = 0  # layers x pages x pairs of ranks
        self.pulls: dict[int, tuple[int, PullPages]] = {}  # rank here, what it was told
        self.retried: set[tuple[int, int, int, int]] = set()
        self.n_bytes = 0
        self.has_token = False
        self.failure: str | None = None
        self.done = False
        self.over = False  # the request ended: its pages are given back when the pulls have


class Fetching:
    """All fetches of one engine core. `messages`, `commands` and `outputs` are what is to be sent since last time."""

    def __init__(self, scheduler: Scheduler, endpoints: list[Endpoint]) -> None:
        """`endpoints`: of the tensor ranks of this core, in order."""
        self._scheduler = scheduler
        self._endpoints = endpoints
        self._fetches: dict[str, _Fetch] = {}
        self._fetch_of_pull: dict[int, _Fetch] = {}
        self._pull_ids = count()
        self._ports: dict[Address, list[int]] = {}  # all cores of the server that listens there
        self._heard_s: dict[Address, float] = {}
        self._core_of: dict[Address, str] = {}
        self.messages: list[tuple[Address, WantCommand]] = []
        self.commands: list[tuple[int, TransferCommand]] = []
        self.outputs: list[Deltas] = []
        self._n_pulled = self._n_pages = self._n_bytes = 0
        self._wait_s = 0.0
        self._fallbacks: Counter[str] = Counter()

    def advance(self, now_s: float) -> None:
        """Ask for the pages of requests that have room now; stop what was read for those that ended."""
        paired = self._scheduler.paired
        for request in paired.reserved:
            self._begin(request, now_s)
        paired.reserved.clear()
        ended = list(paired.ended)
        paired.ended.clear()
        for request in ended:
            self._drop(request)

    def peers(self) -> set[Address]:
        """Cores that compute for this one now: they are told every second that it is still there."""
        return {fetch.home for fetch in self._fetches.values() if fetch.home is not None}

    def spoken_to(self) -> set[Address]:
        """Cores that have been asked for something that is not over."""
        return set().union(*(fetch.asked for fetch in self._fetches.values()))

    def forget(self, address: Address) -> None:
        """Nobody speaks with that core any more."""
        for known in (self._ports, self._heard_s, self._core_of):
            known.pop(address, None)

    def tick(self, now_s: float) -> None:
        """Called a few times a second: give up what takes too long."""
        for fetch in list(self._fetches.values()):
            home = fetch.home
            if home is None:
                if now_s - fetch.since_s > ANSWER_LIMIT_S:
                    self._fail(fetch, "no_answer", f"no answer from {_shown(fetch.named)} in {ANSWER_LIMIT_S:.0f} s")
            elif now_s - self._heard_s.get(home, fetch.since_s) > SILENCE_LIMIT_S:
                self._fail(fetch, "silent", f"{_shown(home)} has been silent for {SILENCE_LIMIT_S:.0f} s")
            elif now_s - fetch.since_s > FETCH_LIMIT_S:
                self._fail(fetch, "slow", f"not all pages came within {FETCH_LIMIT_S:.0f} s")

    def take(self, sender: Address, event: OfferEvent, now_s: float) -> None:
        """A prefill core said something."""
        self._heard_s[sender] = now_s
        match event:
            case Ranks(core, ports):
                self._note_core(sender, core)
                self._ports[sender] = ports
                for fetch in self._fetches.values():
                    if fetch.named == sender and fetch.home is None:
                        self._ask(fetch)
            case StillHere(core):
                self._note_core(sender, core)
            case Accepted() | Offer() | FirstToken() | Refused():
                found = self._fetches.get(event.request_id)
                if found is None or found.failure is not None or found.home not in (None, sender):
                    if not isinstance(event, Refused):
                        self.messages.append((sender, Release(event.request_id)))
                    return
                self._take_about(found, sender, event, now_s)

    def pull_ended(self, event: PullEnded, now_s: float) -> None:
        """A rank is done with a pull, one way or the other."""
        fetch = self._fetch_of_pull.pop(event.pull_id)
        rank, pull = fetch.pulls.pop(event.pull_id)
        if event.error is None:
            fetch.n_left -= len(pull.page_ids) * pull.source.n_layers
            fetch.n_bytes += event.n_bytes
        elif fetch.failure is None and not fetch.over:
            what = (rank, pull.source.first_layer, pull.page_ids[0], fetch.endpoints.index(pull.peer))
            if what in fetch.retried:
                self._fail(fetch, "pull", event.error)
            else:
                fetch.retried.add(what)
                log.warning("request %s: reading again: %s", fetch.request.id, event.error)
                self._pull(fetch, rank, pull.peer, pull)
        self._settle(fetch, now_s)

    def status(self, base: PairingStatus, n_send_failed: int) -> PairingStatus:
        """`base` with the counts of this side."""
        return PairingStatus(
            base.n_awaiting,
            base.n_lent_pages,
            self._n_pulled,
            self._n_pages,
            self._n_bytes,
            round(self._wait_s * 1000),
            n_send_failed,
            dict(self._fallbacks),
        )

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _begin(self, request: Request, now_s: float) -> None:
        fetch = self._fetches[request.id] = _Fetch(request, now_s)
        if fetch.named not in self._ports:
            self.messages.append((fetch.named, WhoIsThere()))
        self._ask(fetch)

    def _ask(self, fetch: _Fetch) -> None:
        host, port = fetch.named
        want = Want(fetch.request.id, prompt_hash(fetch.request.token_ids[: fetch.request.n_prompt]), fetch.first_page)
        for address in [(host, p) for p in self._ports.get(fetch.named) or [port]]:
            if address not in fetch.asked:
                fetch.asked.add(address)
                self.messages.append((address, want))

    def _note_core(self, sender: Address, core: str) -> None:
        before = self._core_of.get(sender)
        self._core_of[sender] = core
        if before not in (None, core):
            for fetch in list(self._fetches.values()):
                if fetch.home == sender:
                    self._fail(fetch, "restarted", f"{_shown(sender)} was started again")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _take_about(
        self, fetch: _Fetch, sender: Address, event: Accepted | Offer | FirstToken | Refused, now_s: float
    ) -> None:
        match event:
            case Refused(_, reason):
                self._fail(fetch, "refused", reason)
            case Accepted(_, endpoints):
                self._accept(fetch, sender, endpoints, now_s)
            case Offer():
                self._offer(fetch, event)
            case FirstToken(_, token_id, logprobs, prompt_logprobs):
                if not fetch.has_token:
                    fetch.has_token = True
                    fetch.request.prompt_logprobs = prompt_logprobs
                    self.outputs.append(self._scheduler.first_token(fetch.request, token_id, logprobs, now_s))
        self.advance(now_s)  # the first token may have been the last
        self._settle(fetch, now_s)

    def _accept(self, fetch: _Fetch, sender: Address, endpoints: list[Endpoint], now_s: float) -> None:
        if fetch.home is not None:
            return
        fetch.home, fetch.since_s, fetch.endpoints = sender, now_s, endpoints
        layouts = [endpoint.layout for endpoint in endpoints]
        try:
            fetch.sources = [source_ranks(mine.layout, layouts) for mine in self._endpoints]
        except LayoutMismatch as error:
            self._fail(fetch, "layout", str(error))
            return
        n_pages = len(fetch.page_ids) - fetch.first_page
        fetch.n_left = sum(map(len, fetch.sources)) * n_pages * self._endpoints[0].layout.n_layers
        for address in fetch.asked - {sender}:
            self.messages.append((address, Release(fetch.request.id)))

    def _offer(self, fetch: _Fetch, offer: Offer) -> None:
        pages = offer.pages
        if fetch.home is None:
            return  # the answer to our question got lost; the limit on it will tell
        if fetch.generation not in (None, pages.generation):
            self._fail(fetch, "preempted", "the prefill server computes the prompt anew")
            return
        fetch.generation = pages.generation
        key = (offer.source, offer.first_page, pages.first_layer)
        end = offer.first_page + len(pages.page_ids)
        in_prompt = fetch.first_page <= offer.first_page and end <= len(fetch.page_ids)
        if key in fetch.offers or not in_prompt or offer.source >= len(fetch.endpoints):
            return
        fetch.offers.add(key)
        for rank, sources in enumerate(fetch.sources):
            if offer.source in sources:
                pull = PullPages(0, fetch.endpoints[offer.source], pages, fetch.page_ids[offer.first_page : end], 0.0)
                self._pull(fetch, rank, pull.peer, pull)

    def _pull(self, fetch: _Fetch, rank: int, peer: Endpoint, like: PullPages) -> None:
        pull = PullPages(next(self._pull_ids), peer, like.source, like.page_ids, PULL_LIMIT_S)
        fetch.pulls[pull.pull_id] = (rank, pull)
        self._fetch_of_pull[pull.pull_id] = fetch
        self.commands.append((rank, pull))

    # ---- the end of a fetch ------------------------------------------------------------------------------------------

    def _fail(self, fetch: _Fetch, kind: str, why: str) -> None:
        if fetch.failure is not None:
            return
        fetch.failure = kind
        self._fallbacks[kind] += 1
        log.warning("request %s: its prompt is computed here: %s", fetch.request.id, why)
        self._stop(fetch)

    def _drop(self, request: Request) -> None:
        fetch = self._fetches.pop(request.id, None)
        assert fetch is not None and fetch.request is request, "a request that awaits pages has a fetch"
        fetch.over = True
        if fetch.failure is None:
            self._stop(fetch)
        elif not fetch.pulls:
            self._settle(fetch, 0.0)

    def _stop(self, fetch: _Fetch) -> None:
        """Cancel what runs and tell the prefill side."""
        for address in fetch.asked if fetch.home is None else {fetch.home}:
            self.messages.append((address, Release(fetch.request.id)))
        for pull_id, (rank, _) in fetch.pulls.items():
            self.commands.append((rank, CancelPull(pull_id)))
        if not fetch.pulls:
            self._settle(fetch, 0.0)

    def _settle(self, fetch: _Fetch, now_s: float) -> None:
        """Go on once nothing is read any more."""
        if fetch.pulls or fetch.done:
            return
        request_id = fetch.request.id
        if fetch.over:
            self._scheduler.paired.pulls_ended(fetch.request.arrival)
        elif self._fetches.get(request_id) is not fetch:
            return
        elif fetch.failure is not None:
            del self._fetches[request_id]
            self._scheduler.paired.compute_here(fetch.request)
            self._scheduler.wait(fetch.request)
        elif fetch.home is not None and fetch.has_token and fetch.n_left == 0:
            del self._fetches[request_id]
            self._scheduler.paired.filled_up(fetch.request)
            self.messages.append((fetch.home, Release(request_id)))
            self._n_pulled += 1
            self._n_pages += len(fetch.page_ids) - fetch.first_page
            self._n_bytes += fetch.n_bytes
            self._wait_s += now_s - fetch.reserved_s
        else:
            return
        fetch.done = True
        for rank in range(len(self._endpoints)):
            self.commands.append((rank, ForgetPulls(request_id)))


def _shown(address: Address) -> str:
    return f"the prefill server at {address[0]}:{address[1]}"
