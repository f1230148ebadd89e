"""The loads that several workers of one router have at each server, in memory that they share.

Every worker writes its own row only and reads all rows, so nothing is locked on the way of a request; a number that is
being written is read as it was or as it will be. A server is a column; columns are given out under a lock, when a
server registers.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdeploy.errors import FastDeployError

MAX_SERVERS = 1024
N_CELLS = 4  # of a server in a row: whether it is known there, requests, waiting, tokens


class SharedLoads:
    """The table. Made by the parent before it starts the workers, which inherit the memory."""

    def __init__(self, n_workers: int, lock_file: Path, max_servers: int = MAX_SERVERS) -> None:
        self._n_workers, self._max_servers, self._lock_file = n_workers, max_servers, lock_file
        self._row_cells = max_servers * N_CELLS
        self._cells = memoryview(mmap.mmap(-1, 8 * (max_servers + n_workers * self._row_cells))).cast("q")

    def column(self, worker: int, url: str) -> SharedLoad:
        """The cells of a server, for one worker. Raises `FastDeployError` when there are too many servers."""
        key = int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest(), signed=True) or 1
        with self._locked():
            keys = self._cells[: self._max_servers].tolist()
            if key in keys:
                i = keys.index(key)
            else:
                i = next((i for i in range(self._max_servers) if not keys[i] or not self._is_known(i)), -1)
                if i < 0:
                    raise FastDeployError(f"more than {self._max_servers} servers")
                self._cells[i] = key
            starts = [self._max_servers + row * self._row_cells + i * N_CELLS for row in range(self._n_workers)]
            own = starts.pop(worker)
            self._cells[own] = 1
        return SharedLoad(self._cells, own, starts)

    def clear(self, worker: int) -> None:
        """Forget what a worker that died had on its way."""
        start = self._max_servers + worker * self._row_cells
        for i in range(start, start + self._row_cells):
            self._cells[i] = 0

    def _is_known(self, i: int) -> bool:
        start = self._max_servers + i * N_CELLS
        return any(self._cells[start + row * self._row_cells] for row in range(self._n_workers))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX)  # ends with the file, and with the process
            yield
        finally:
            os.close(fd)


class SharedLoad:
    """One server: the cells of one worker, and those of the others."""

    __slots__ = ("_cells", "_others", "_own")

    def __init__(self, cells: memoryview, own: int, others: list[int]) -> None:
        self._cells, self._own, self._others = cells, own, others

    def add(self, n_requests: int, n_waiting: int, n_tokens: int) -> None:
        """Change the own cells by so much."""
        cells, own = self._cells, self._own
        cells[own + 1] += n_requests
        cells[own + 2] += n_waiting
        cells[own + 3] += n_tokens

    def others(self) -> tuple[int, int, int]:
        """Requests, waiting and tokens of all other workers."""
        cells = self._cells
        n_requests = n_waiting = n_tokens = 0
        for start in self._others:
            n_requests += cells[start + 1]
            n_waiting += cells[start + 2]
            n_tokens += cells[start + 3]
        return n_requests, n_waiting, n_tokens

    def release(self) -> None:
        """This worker does not know the server any more."""
        self._cells[self._own] = 0
