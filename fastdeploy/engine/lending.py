"""Prefill side of requests that two servers compute: joins request and question, passes on what is computed.

No sockets and no clock, as on the decode side (`fetching`). A request is computed when a decode server wants it, and
its pages stay until that server releases them or has not been heard of for the length of a lease.
"""

from __future__ import annotations

import logging

import msgspec

from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import Deltas, Scheduler
from fastdeploy.engine.step import PlannedStep
from fastdeploy.transfer.base import Endpoint
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
from fastdeploy.wire.messages import PageOrder, PagesComputed, StepPlan

LEASE_S = 30.0  # since the decode server was heard of

log = logging.getLogger("fastdeploy.pairing")


class Lending:
    """All that one engine core computes for others. `messages` and `outputs` are what is to be sent since last time."""

    def __init__(self, scheduler: Scheduler, endpoints: list[Endpoint], core: str, wait_limit_s: float) -> None:
        """`core` is unique for each start; a request is given up when nobody wants it for `wait_limit_s`."""
        self._scheduler = scheduler
        self._endpoints = endpoints
        self._core = core
        self._wait_limit_s = wait_limit_s
        self._wants: dict[str, tuple[bytes, Want, float]] = {}  # by peers, of requests that have not come yet
        self._unwanted_since_s: dict[str, float] = {}
        self._peer_of: dict[str, bytes] = {}  # of each request that is computed or lent
        self._heard_s: dict[bytes, float] = {}
        self.siblings: list[int] = []
        self.messages: list[tuple[bytes, OfferEvent]] = []
        self.outputs: list[Deltas] = []
        self.n_send_failed = 0

    def submitted(self, request_id: str, now_s: float) -> None:
        """The scheduler has a new request of this kind."""
        self._unwanted_since_s[request_id] = now_s
        asked = self._wants.pop(request_id, None)
        if asked is not None:
            self._join(asked[0], asked[1])

    def take(self, peer: bytes, command: WantCommand, now_s: float) -> None:
        """A decode core said something."""
        self._heard_s[peer] = now_s
        match command:
            case WhoIsThere():
                self.messages.append((peer, Ranks(self._core, self.siblings)))
            case Want(request_id):
                if request_id in self._unwanted_since_s:
                    self._join(peer, command)
                elif request_id not in self._peer_of:
                    self._wants[request_id] = (peer, command, now_s)
            case Release(request_id):
                asked = self._wants.get(request_id)
                if asked is not None and asked[0] == peer:
                    del self._wants[request_id]
                if self._peer_of.get(request_id) == peer:
                    self._end(request_id)
            case StillHere():
                pass

    def peers(self) -> set[bytes]:
        """Decode cores that this one computes for or lends to now."""
        return set(self._peer_of.values())

    def tick(self, now_s: float) -> None:
        """Called a few times a second: end leases and requests that nobody wants."""
        for request_id, peer in list(self._peer_of.items()):
            if now_s - self._heard_s[peer] > LEASE_S:
                self.n_send_failed += 1
                log.warning("request %s: the decode server has been silent for %.0f s", request_id, LEASE_S)
                self._end(request_id)
        for request_id, since_s in list(self._unwanted_since_s.items()):
            request = self._scheduler.paired.unwanted.get(request_id)
            if request is None:  # its client has left
                del self._unwanted_since_s[request_id]
            elif now_s - since_s > self._wait_limit_s:
                del self._unwanted_since_s[request_id]
                self.n_send_failed += 1
                error = f"no decode server asked for this request within {self._wait_limit_s:g} s"
                self.outputs.append(self._scheduler.fail(request, error))
        late = [request_id for request_id, (_, _, at_s) in self._wants.items() if now_s - at_s > self._wait_limit_s]
        for request_id in late:
            del self._wants[request_id]
        active = self.peers() | {peer for peer, _, _ in self._wants.values()}
        self._heard_s = {peer: s for peer, s in self._heard_s.items() if peer in active or now_s - s < LEASE_S}

    def with_orders(self, step: PlannedStep) -> StepPlan:
        """The plan, which says which pages it completes; to be called once it is final, before the next is planned."""
        orders = [order for request in step.requests if request.lends_pages and (order := _order(request))]
        return msgspec.structs.replace(step.plan, orders=orders) if orders else step.plan

    def computed(self, source: int, event: PagesComputed) -> None:
        """Tensor rank `source` has some pages."""
        request_id = event.pages.request_id
        peer = self._peer_of.get(request_id)
        if peer is not None:
            self.messages.append((peer, Offer(request_id, source, event.first_page, event.pages)))

    def watch(self, deltas: Deltas) -> None:
        """What the scheduler gives to clients: first tokens are passed on, and the end of what fails."""
        if not self._peer_of:
            return
        for of_client in deltas.values():
            for delta in of_client:
                peer = self._peer_of.get(delta.request_id)
                if peer is None:
                    continue
                if delta.token_ids:
                    logprobs = delta.logprobs[0] if delta.logprobs else None
                    token = FirstToken(delta.request_id, delta.token_ids[0], logprobs, delta.prompt_logprobs)
                    self.messages.append((peer, token))
                elif delta.finish_reason is not None:
                    del self._peer_of[delta.request_id]
                    reason = delta.error or "the request was aborted at the prefill server"
                    self.messages.append((peer, Refused(delta.request_id, reason)))

    def _join(self, peer: bytes, want: Want) -> None:
        """Both the request and the question are here."""
        self._unwanted_since_s.pop(want.request_id, None)
        request = self._scheduler.paired.unwanted.get(want.request_id)
        if request is None:
            return
        if prompt_hash(request.token_ids) != want.prompt_hash:
            error = "the two servers were given different prompts; check that both have the same model and tokenizer"
            self.messages.append((peer, Refused(want.request_id, error)))
            self.outputs.append(self._scheduler.fail(request, error))
            return
        self._peer_of[want.request_id] = peer
        self.messages.append((peer, Accepted(want.request_id, self._endpoints)))
        self._scheduler.paired.wanted(request, want.first_page)
        self._scheduler.wait(request)

    def _end(self, request_id: str) -> None:
        """The decode server is done with a prompt, or computes it itself: it is given up here in any state."""
        del self._peer_of[request_id]
        self._scheduler.paired.take_back(request_id)
        request = self._scheduler.find(request_id)
        if request is not None and request.lends_pages:
            self.outputs.append(self._scheduler.abort([request_id]))


def _order(request: Request) -> PageOrder | None:
    """The pages of a prompt that the newest plan completes and nobody has offered."""
    if not request.alive or request.slot < 0:
        return None
    first = request.n_offered
    whole = request.n_planned >= request.n_prompt
    end = -(-request.n_prompt // request.page_tokens) if whole else request.n_planned // request.page_tokens
    if first >= end:
        return None
    request.n_offered = end
    return PageOrder(request.id, request.n_starts, first, request.pages[first:end])
