"""What is on its way at each server, counted exactly: whatever a request adds, its end takes away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastdeploy.router.shared_loads import SharedLoad


@dataclass(frozen=True, slots=True)
class RemoteFigures:
    """What a server said about itself, and how many requests of ours were there at that moment."""

    n_running: int
    n_waiting: int
    n_requests_then: int


@dataclass(slots=True)
class ServerLoad:
    """The load of one server, as policies see it. Only `Ticket` changes the counts."""

    url: str
    generation: int = 0  # another one after the server was away: what it had in its cache is gone
    n_requests: int = 0  # in flight
    n_waiting: int = 0  # of those, streams that have not begun
    n_tokens: int = 0  # estimated prompt tokens of those in flight, and the events that they got so far
    n_requests_total: int = 0
    n_tokens_total: int = 0
    n_events_total: int = 0  # stream events that came back, about one per generated token
    remote: RemoteFigures | None = None  # None while the server's own figures are unknown or old
    shared: SharedLoad | None = None  # with several workers: the counts above contain what `see_others` saw of theirs
    _others: tuple[int, int, int] = (0, 0, 0)

    def see_others(self) -> None:
        """Bring what other workers have on its way there up to date."""
        if self.shared is not None:
            now, before = self.shared.others(), self._others
            self._others = now
            self.n_requests += now[0] - before[0]
            self.n_waiting += now[1] - before[1]
            self.n_tokens += now[2] - before[2]

    @property
    def n_running(self) -> int:
        """Requests in flight that have begun, or cannot be seen to."""
        return self.n_requests - self.n_waiting


class Ticket:
    """The part of a server's load that one request is."""

    __slots__ = ("_is_open", "_is_waiting", "_load", "_n_tokens")

    def __init__(self, load: ServerLoad, n_tokens: int, is_stream: bool) -> None:
        self._load, self._n_tokens, self._is_waiting, self._is_open = load, n_tokens, is_stream, True
        load.n_requests += 1
        load.n_waiting += is_stream
        load.n_tokens += n_tokens
        load.n_requests_total += 1
        load.n_tokens_total += n_tokens
        if load.shared is not None:
            load.shared.add(1, is_stream, n_tokens)

    def events(self, n: int) -> None:
        """So many events of the stream came."""
        load, began = self._load, self._is_waiting
        if began:
            self._is_waiting = False
            load.n_waiting -= 1
        self._n_tokens += n
        load.n_tokens += n
        load.n_events_total += n
        if load.shared is not None:
            load.shared.add(0, -began, n)

    def end(self) -> None:
        """The request has left the server; a second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        load = self._load
        load.n_requests -= 1
        load.n_waiting -= self._is_waiting
        load.n_tokens -= self._n_tokens
        if load.shared is not None:
            load.shared.add(-1, -self._is_waiting, -self._n_tokens)


@dataclass(slots=True)
class Ledger:
    """The loads of all servers by URL; that of a server that went away is kept while requests are still there."""

    share: Callable[[str], SharedLoad] | None = None  # gives the part of a server's load that other workers see
    _loads: dict[str, ServerLoad] = field(default_factory=dict)
    _n_generations: int = 0

    def joined(self, url: str) -> ServerLoad:
        """The load of a server that comes, or comes back."""
        load = self._loads.get(url)
        if load is None:
            load = self._loads[url] = ServerLoad(url, shared=self.share(url) if self.share is not None else None)
        self._n_generations += 1
        load.generation, load.remote = self._n_generations, None
        return load

    def forget_idle(self, known: set[str]) -> None:
        """Drop the loads of servers that are not `known` any more and have nothing in flight."""
        for url, load in list(self._loads.items()):
            load.see_others()
            if url not in known and load.n_requests == 0:
                if load.shared is not None:
                    load.shared.release()
                del self._loads[url]
