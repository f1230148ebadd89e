"""Memory that the ranks of one machine share, and the meetings at which what one wrote becomes visible to all.

The memory has no name: group rank 0 makes it, the others open it through /proc, and the kernel frees it with the last
process. It holds two buffers that are used in turn, so one meeting for each exchange is enough: whoever writes into a
buffer again has met all ranks since they last read it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from fastdeploy.config.hardware import n_usable_cpus
from fastdeploy.errors import EngineDeadError, EngineStartError

_FUTEX_CALLS: Mapping[str, int] = {"x86_64": 202, "aarch64": 98}  # number of the system call
_FUTEX_WAIT, _FUTEX_WAKE, _ALL_WAITERS = 0, 1, 2**31 - 1
_COUNTER_BYTES = 64  # one cache line each
_SPIN_S = 200e-6  # as long as a sleeper takes to come back, twice over
TELL_FIRST_S = 1.0  # time for whoever knows more to report a failed exchange first
_SLICE_S = 0.5  # how often a sleeper looks whether the others are alive
_WRAP = 1 << 31


class _TimeSpec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def is_supported() -> bool:
    """Whether ranks of this machine can meet in shared memory."""
    return platform.system() == "Linux" and platform.machine() in _FUTEX_CALLS


class SharedRegion:
    """Two shared buffers of `n_bytes` each, for the ranks named in `names` (all of one machine).

    Write into `buffer()`, `meet()`, read what all wrote, until the next `meet()`. All ranks make the same calls.
    Making one is collective as well: `store` is a store of these ranks alone.
    """

    def __init__(
        self, store: Store, rank: int, names: Sequence[str], n_bytes: int, *, n_ranks_here: int, deadline_s: float
    ) -> None:
        self.rank = rank
        self.size = len(names)
        self.n_bytes = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._names = names
        self._deadline_s = deadline_s
        header_bytes = -(-self.size * _COUNTER_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._processes, mapping = _share(store, rank, self.size, header_bytes + 2 * self.n_bytes, deadline_s)
        memory = np.frombuffer(mapping, np.uint8)
        self._counters = memoryview(mapping)[: self.size * _COUNTER_BYTES].cast("I")
        self._counter_addresses = [memory.ctypes.data + i * _COUNTER_BYTES for i in range(self.size)]
        whole = torch.from_numpy(memory)
        self._buffers = tuple(whole[header_bytes + i * self.n_bytes :][: self.n_bytes] for i in range(2))
        self._n_met = 0
        # On cores of their own the others come soon; on shared cores they cannot while this rank spins.
        self._spin_s = _SPIN_S if n_ranks_here <= n_usable_cpus() else 0.0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._futex_call = _FUTEX_CALLS[platform.machine()]
        self._is_ordered = platform.machine() == "x86_64"

    @property
    def turn(self) -> int:
        """Which of the two buffers is in use, 0 or 1."""
        return self._n_met & 1

    def buffer(self) -> Tensor:
        """The buffer of the coming meeting, uint8 [n_bytes]; after it the same one is to be read."""
        return self._buffers[self._n_met & 1]

    def meet(self) -> None:
        """Let all others see what was written, and wait until they have written.

        Raises EngineDeadError naming a rank that is gone or does not come in time.
        """
        self.announce()
        self.wait()

    def announce(self) -> None:
        """The first half of `meet`: what was written is there for the others. Leave the buffer alone until `wait`."""
        self._n_met = (self._n_met + 1) % _WRAP
        if not self._is_ordered:
            self._wake()  # a system call keeps the counter behind the data
        self._counters[self.rank * (_COUNTER_BYTES // 4)] = self._n_met
        self._wake()

    def wait(self) -> None:
        """The second half of `meet`: what the others have written is there. Raises EngineDeadError as that does."""
        for rank in range(self.size):
            if rank != self.rank and not self._has_come(rank):
                self._wait_for(rank)
        if not self._is_ordered:
            self._wake()

    def _has_come(self, rank: int) -> bool:
        return (self._counters[rank * (_COUNTER_BYTES // 4)] - self._n_met) % _WRAP < _WRAP // 2

    def _wait_for(self, rank: int) -> None:
        started_s = time.monotonic()
        while time.monotonic() - started_s < self._spin_s:
            if self._has_come(rank):
                return
            os.sched_yield()  # whoever shares the core may be the one that is waited for
        pause = _TimeSpec(int(_SLICE_S), int(_SLICE_S % 1 * 1e9))
        while True:
            seen = self._counters[rank * (_COUNTER_BYTES // 4)]
            if self._has_come(rank):
                return
            address = ctypes.c_void_p(self._counter_addresses[rank])
            self._libc.syscall(
                self._futex_call, address, _FUTEX_WAIT, ctypes.c_uint32(seen), ctypes.byref(pause), None, 0
            )
            waited_s = time.monotonic() - started_s
            if waited_s > _SLICE_S:
                self._check(rank, waited_s)

    def _check(self, rank: int, waited_s: float) -> None:
        """Raises when waiting for `rank` has no sense any more."""
        if self._has_come(rank):
            return
        poll = select.poll()
        for fd in self._processes:
            poll.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        dead = [name for name, fd in zip(self._names, self._processes, strict=True) if fd in ended]
        if dead:
            time.sleep(TELL_FIRST_S)  # its core knows why; when that is gone as well, this has to do
            raise EngineDeadError(f"{self._names[self.rank]}: {', '.join(dead)} is gone, in the middle of a step")
        if waited_s > self._deadline_s:
            raise EngineDeadError(
                f"{self._names[self.rank]}: waited {waited_s:.0f} s for {self._names[rank]} in the middle of a step; "
                f"it lives but does not come: see its log"
            )

    def _wake(self) -> None:
        address = ctypes.c_void_p(self._counter_addresses[self.rank])
        self._libc.syscall(self._futex_call, address, _FUTEX_WAKE, _ALL_WAITERS, None, None, 0)


def _share(store: Store, rank: int, size: int, n_bytes: int, deadline_s: float) -> tuple[list[int], mmap.mmap]:
    """(a descriptor of each rank's process, the memory); every rank has both when this returns."""
    patience = timedelta(seconds=deadline_s)
    descriptor = -1
    if rank == 0:
        descriptor = os.memfd_create("fastdeploy-ranks", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, n_bytes)
    store.set(f"process/{rank}", f"{os.getpid()} {descriptor}")
    store.wait([f"process/{i}" for i in range(size)], patience)
    processes = [store.get(f"process/{i}").decode().split() for i in range(size)]
    try:
        descriptors = [os.pidfd_open(int(pid)) for pid, _ in processes]
        if rank != 0:
            pid, number = processes[0]
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        mapping = mmap.mmap(descriptor, n_bytes)
    except OSError as exc:
        raise EngineStartError(
            f"rank {rank} of its group cannot reach the memory of the others: {exc}; ranks of one machine must run as "
            f"one user and see each other in /proc; FD_ALL_TO_ALL=gloo does without"
        ) from exc
    store.set(f"mapped/{rank}", "")
    store.wait([f"mapped/{i}" for i in range(size)], patience)  # before rank 0 gives its descriptor up
    os.close(descriptor)
    return descriptors, mapping
