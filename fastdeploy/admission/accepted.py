"""The requests that this server has accepted and must answer, wherever they run.

An attempt is one placement of a request. Results carry its number and count from 0: those of an older attempt, or
seen before, are dropped, and a gap ends the attempt. So no token reaches a client twice. When an attempt is lost the
request is placed again with the tokens that its client has; a draw depends on seed and output position only, so the
answer goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from fastdeploy.admission.messages import Result
from fastdeploy.errors import EngineUnavailable, FastDeployError, RequestError, RequestTimeout
from fastdeploy.frontend.client import Sink
from fastdeploy.wire.messages import Submit, TokenDelta

MAX_ATTEMPTS = 4  # a request that was lost so often may be what kills its servers

log = logging.getLogger("fastdeploy.scheduler")


@dataclass(slots=True, eq=False)
class Entry:
    """One accepted request."""

    request: Submit
    inbox: Sink
    attempt: int = 0
    nodes: tuple[str, ...] = ()  # where the attempt is; empty while it waits for a place
    local: bool = False  # in an engine of this server
    taken_s: float | None = None  # Redis' time at which the node took the attempt, once it has said so
    next_seq: int = 0
    output_ids: list[int] = field(default_factory=list)  # what the answer has; a request may come with some

    @property
    def has_begun(self) -> bool:
        """Whether a token was generated for it here or on a node."""
        return len(self.output_ids) > len(self.request.output_ids)

    @property
    def n_tokens(self) -> int:
        """Prompt tokens, what load is counted in."""
        return len(self.request.prompt_ids)


class Accepted:
    """The table of them. `place` gets an entry that needs a node, `cancel` one whose attempt
    is void, `refuse` the news that somebody took an attempt that is void already."""

    def __init__(
        self, place: Callable[[Entry], None], cancel: Callable[[Entry], None], refuse: Callable[[Result], None]
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.n_placed_again = 0
        self._place = place
        self._cancel = cancel
        self._refuse = refuse

    def add(self, request: Submit, inbox: Sink) -> None:
        """A new request; its deltas go to `inbox`."""
        entry = Entry(request, inbox, output_ids=list(request.output_ids))
        self.entries[request.request_id] = entry
        self._place(entry)

    def take(self, result: Result) -> None:
        """Something came of an attempt on another server."""
        entry = self.entries.get(result.request_id)
        if entry is None or entry.attempt != result.attempt or entry.local or result.seq < entry.next_seq:
            if result.delta is None and (entry is None or entry.local or entry.attempt != result.attempt):
                self._refuse(result)
            return
        if result.seq > entry.next_seq:
            self.lose(entry, f"results {entry.next_seq} to {result.seq - 1} of node {result.node} were lost")
            return
        entry.next_seq += 1
        if result.delta is None:
            entry.taken_s = result.taken_s
            if result.node not in entry.nodes:  # with global, the node that took it says so
                entry.nodes = (result.node,)
        else:
            self.deliver(entry, result.delta)

    def deliver(self, entry: Entry, delta: TokenDelta) -> None:
        """What came of the current attempt."""
        if delta.finish_reason == "error" and delta.error_kind == EngineUnavailable.__name__:
            self.lose(entry, delta.error or "its engine is gone")
            return
        request_id = entry.request.request_id
        entry.output_ids += delta.token_ids
        if delta.finish_reason is not None:
            self.entries.pop(request_id, None)
        if delta.request_id != request_id:
            delta = msgspec.structs.replace(delta, request_id=request_id)
        entry.inbox.put(delta)

    def sink(self, entry: Entry) -> Sink:
        """Where an engine of this server puts the deltas of the current attempt."""
        return _OwnAttempt(self, entry, entry.attempt)

    def lose(self, entry: Entry, reason: str) -> None:
        """The attempt is over without an end: place the request again, or fail it when that was tried too often."""
        request_id = entry.request.request_id
        if self.entries.get(request_id) is not entry:
            return
        self._cancel(entry)
        entry.nodes, entry.local, entry.taken_s, entry.next_seq = (), False, None, 0
        entry.attempt += 1
        n_known = len(entry.output_ids)
        if entry.attempt >= MAX_ATTEMPTS:
            self.fail(entry, EngineUnavailable(f"given up after {MAX_ATTEMPTS} servers: {reason}"))
        else:
            log.warning(
                "(%s) placed again, attempt %d, after %d tokens: %s", request_id, entry.attempt, n_known, reason
            )
            self.n_placed_again += 1
            self._place(entry)

    def fail(self, entry: Entry, error: RequestError) -> None:
        """End a request with an error."""
        request_id = entry.request.request_id
        self.entries.pop(request_id, None)
        entry.inbox.put(TokenDelta(request_id, [], "error", error=error.message, error_kind=type(error).__name__))

    def end(self, request_ids: Iterable[str], *, tell: bool) -> None:
        """End requests on behalf of their client; with `tell` the inbox gets a last delta."""
        for request_id in request_ids:
            entry = self.entries.pop(request_id, None)
            if entry is not None:
                self._cancel(entry)
                if tell:
                    entry.inbox.put(TokenDelta(request_id, [], "abort"))

    def expire(self, now_s: float, ttl_s: float) -> None:
        """Fail those that have no token `ttl_s` seconds after they came."""
        late = [e for e in self.entries.values() if not e.has_begun and now_s - e.request.arrival_s > ttl_s]
        for entry in late:
            self._cancel(entry)
            self.fail(entry, RequestTimeout(f"no token within {ttl_s:.0f} s (--scheduler-ttl)"))

    def on_nodes(self, nodes: set[str]) -> list[Entry]:
        """Requests whose answer depends on one of these nodes: once it has a token, the first of `Entry.nodes` only."""
        return [
            e
            for e in self.entries.values()
            if not e.local and e.nodes and (e.nodes[0] in nodes or (not e.has_begun and not nodes.isdisjoint(e.nodes)))
        ]

    def remote(self) -> list[Entry]:
        """Requests that are on other servers."""
        return [e for e in self.entries.values() if e.nodes and not e.local]


class _OwnAttempt:
    """Passes on what an engine of this server says of one attempt: no Redis on the way of a token."""

    def __init__(self, accepted: Accepted, entry: Entry, attempt: int) -> None:
        self._accepted = accepted
        self._entry = entry
        self._attempt = attempt

    def put(self, delta: TokenDelta) -> None:
        """A delta, unless the attempt is over."""
        if self._entry.attempt == self._attempt:
            self._accepted.deliver(self._entry, delta)

    def fail(self, error: FastDeployError) -> None:
        """The engine is gone."""
        if self._entry.attempt == self._attempt:
            self._accepted.lose(self._entry, str(error))
