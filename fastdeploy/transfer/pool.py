"""Pulls that threads carry out, for transports that copy by themselves. Each has a deadline and can be given up.

`PooledTransport` is what all of these transports do alike.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from fastdeploy.errors import PullTimeout
from fastdeploy.transfer.base import PageSet, Peer
from fastdeploy.transfer.ledger import Ledger
from fastdeploy.transfer.memory import PageMemory

N_THREADS = 2  # copies share the memory's bandwidth with the model, so more would gain little


class StoppedError(Exception):
    """The pull was given up; nobody waits for it."""


class Stop:
    """When a thread has to leave its pull: at the deadline, or when told. It looks between pieces of a few MiB."""

    def __init__(self, deadline_s: float, what: str) -> None:
        self._until = time.monotonic() + deadline_s
        self._limit_s = deadline_s
        self._what = what
        self._lock = threading.Lock()
        self._told = False
        self._connection: socket.socket | None = None

    def tell(self) -> None:
        """Make `check` raise, and wake the thread if it waits in its socket."""
        with self._lock:
            self._told = True
            if self._connection is not None:
                with contextlib.suppress(OSError):  # it has ended by itself
                    self._connection.shutdown(socket.SHUT_RDWR)

    def watch(self, connection: socket.socket | None) -> None:
        """`connection` is what the thread may wait in from now on. Raises StoppedError when already told."""
        with self._lock:
            self._connection = connection
        if connection is not None:
            self.check()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, below 0 after it."""
        return self._until - time.monotonic()

    def check(self) -> None:
        """Raises StoppedError when told, PullTimeout after the deadline."""
        if self._told:
            raise StoppedError
        if self.left_s <= 0:
            raise self.timeout()

    def timeout(self) -> PullTimeout:
        """The error of a deadline that has passed."""
        return PullTimeout(f"{self._what} did not come within {self._limit_s:g} s")


@dataclass(slots=True)
class PoolPull:
    """Implements Pull."""

    peer: Peer
    source: PageSet
    stop: Stop
    future: Future[None] = field(default_factory=Future)
    ended: bool = False


Read = Callable[[Stop], None]


class PullPool:
    """Threads for pulls, and the ledger of those. Except for the reads, calls come from one thread."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.ledger = ledger
        self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix=f"transfer-{name}")
        self._pulls: dict[int, PoolPull] = {}

    def start(self, peer: Peer, source: PageSet, page_ids: Sequence[int], deadline_s: float, read: Read) -> PoolPull:
        """Have `read` called on a thread, once the ledger agrees; it must check its Stop often."""
        self.ledger.begin(peer.endpoint, source, page_ids)
        what = f"{len(page_ids)} pages of request {source.request_id} from {peer.endpoint.host}"
        pull = PoolPull(peer, source, Stop(deadline_s, what))
        pull.future = self._threads.submit(read, pull.stop)
        self._pulls[id(pull)] = pull
        return pull

    def poll(self, pull: PoolPull) -> Literal["pending", "done"]:
        """As in Transport."""
        if not pull.future.done():
            if pull.stop.left_s > 0:
                return "pending"
            self.cancel(pull)
            raise pull.stop.timeout()
        try:
            pull.future.result()
        except (StoppedError, CancelledError) as error:
            self._end(pull, succeeded=False)
            raise PullTimeout(f"pages of request {pull.source.request_id}: the pull was given up") from error
        except Exception:
            self._end(pull, succeeded=False)
            raise
        self._end(pull, succeeded=True)
        return "done"

    def cancel(self, pull: PoolPull) -> None:
        """As in Transport: after it no thread works for this pull."""
        pull.stop.tell()
        pull.future.cancel()
        if not pull.future.cancelled():
            pull.future.exception()  # waits for the thread; what it raised interests nobody
        self._end(pull, succeeded=False)

    def cancel_of(self, peer: Peer) -> None:
        """Give up all pulls from a peer; `poll` says so."""
        for pull in list(self._pulls.values()):
            if pull.peer is peer:
                self.cancel(pull)

    def close(self) -> None:
        """Give up all pulls and end the threads."""
        for pull in list(self._pulls.values()):
            self.cancel(pull)
        self._threads.shutdown()

    def _end(self, pull: PoolPull, *, succeeded: bool) -> None:
        if not pull.ended:
            pull.ended = True
            del self._pulls[id(pull)]
            self.ledger.end(pull.source, succeeded=succeeded)


P = TypeVar("P", bound=Peer)


class PooledTransport(ABC, Generic[P]):
    """A Transport but for `offer`, `connect`, `pull` and `disconnect`: its pulls, and its peers by their owner."""

    def __init__(self, memory: PageMemory, name: str) -> None:
        self._memory = memory
        self._pool = PullPool(Ledger(memory.layout), name)
        self._peers: dict[str, P] = {}

    @abstractmethod
    def disconnect(self, peer: P) -> None:
        """As in Transport."""

    def poll(self, pull: PoolPull) -> Literal["pending", "done"]:
        """As in Transport."""
        return self._pool.poll(pull)

    def cancel(self, pull: PoolPull) -> None:
        """As in Transport."""
        self._pool.cancel(pull)

    def forget(self, request_id: str) -> None:
        """As in Transport."""
        self._pool.ledger.forget(request_id)

    def close(self) -> None:
        """As in Transport."""
        for peer in list(self._peers.values()):
            self.disconnect(peer)
        self._pool.close()
