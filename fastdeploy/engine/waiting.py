"""Requests without a slot, in the order in which they are to start: first those that ran before."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from fastdeploy.engine.request import Request

by_arrival = attrgetter("arrival")


class WaitingRoom:
    """Two queues, each in order of arrival."""

    def __init__(self) -> None:
        self._preempted: list[Request] = []  # at most as many as there are slots, nearly always none
        self._fresh: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._preempted) + len(self._fresh)

    def __iter__(self) -> Iterator[Request]:
        return chain(self._preempted, self._fresh.values())

    def put(self, request: Request) -> None:
        """Queue a request: one that never ran behind all others, one that did by its arrival among its like."""
        if request.n_starts:
            insort(self._preempted, request, key=by_arrival)
        else:
            self._fresh[request.id] = request

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands; before its `n_starts` changes."""
        if request.n_starts:
            self._preempted.remove(request)
        else:
            del self._fresh[request.id]

    def overdue(self, queued_before_s: float) -> list[Request]:
        """Requests that were queued before that time and never ran."""
        late = []
        for request in self._fresh.values():
            if request.queued_s >= queued_before_s:
                break
            late.append(request)
        return late
