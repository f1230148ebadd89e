"""Where finished weights lie: in memory of this rank alone, or once for all ranks of a machine that hold the same.

Replicas that spread their experts have everything else in common. The first of them on a machine prepares each weight
and copies it into memory that has no name; the others open that memory through /proc and map it read-only, so they
neither read nor keep what they share. The kernel frees it with the last process.
"""

from __future__ import annotations

import logging
import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from fastdeploy.config.hardware import memory_bytes
from fastdeploy.config.schema import ParallelConfig
from fastdeploy.distributed import topology
from fastdeploy.errors import EngineStartError

_PATIENCE = timedelta(seconds=300)  # for one weight, which may come from a slow disk
_ALIGN_BYTES = 64  # a cache line

log = logging.getLogger("fastdeploy.weights")


class WeightMemory(Protocol):
    """Keeps the weights of one rank. Ranks that share make the same calls in the same order."""

    borrowed_bytes: int  # of the weights kept, those that another rank accounts for

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        """The finished weight, contiguous and never written to again; `make` is called where it has to be made."""
        ...


class OwnMemory:
    """Every weight is this rank's own; implements WeightMemory."""

    borrowed_bytes = 0

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        return make()


class LentMemory:
    """Of the rank that prepares the weights: it lends them to the others; implements WeightMemory.

    `n_bytes` bounds all weights together; memory is taken for those that come.
    """

    borrowed_bytes = 0

    def __init__(self, store: Store, n_bytes: int) -> None:
        self._store = store
        self._descriptor = os.memfd_create("fastdeploy-weights", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)  # open for as long as somebody may want to open it
        os.ftruncate(self._descriptor, n_bytes)
        mapping = mmap.mmap(self._descriptor, n_bytes)
        _want_huge_pages(mapping)
        self._memory = torch.from_numpy(np.frombuffer(mapping, np.uint8))
        self._end = 0
        self._n_kept = 0
        where = _Where(os.getpid(), self._descriptor, os.fstat(self._descriptor).st_ino, n_bytes)
        store.set("where", msgspec.json.encode(where).decode())

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        made = make()
        begin = -(-self._end // _ALIGN_BYTES) * _ALIGN_BYTES
        self._end = begin + made.nbytes
        if self._end > self._memory.nbytes:
            raise EngineStartError(f"the weights take more than this machine's {self._memory.nbytes:,} bytes of memory")
        kept = self._memory[begin : self._end].view(made.dtype).view(made.shape)
        kept.copy_(made)
        dtype = str(made.dtype).removeprefix("torch.")
        loan = _Loan(begin, self._end, dtype, list(made.shape))
        self._store.set(f"weight/{self._n_kept}", msgspec.json.encode(loan).decode())
        self._n_kept += 1
        return kept


class BorrowedMemory:
    """Of a rank that uses the weights another one prepares; implements WeightMemory."""

    def __init__(self, store: Store, lender: str) -> None:
        """Raises OSError when the memory cannot be reached, EngineStartError when the lender is gone."""
        self.borrowed_bytes = 0
        self._store = store
        self._lender = lender
        self._n_kept = 0
        where = msgspec.json.decode(self._get("where"), type=_Where)
        descriptor = os.open(f"/proc/{where.pid}/fd/{where.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_ino != where.inode:
                raise OSError(f"process {where.pid} is not {lender}: they do not see the same processes")
            mapping = mmap.mmap(descriptor, where.n_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        _want_huge_pages(mapping)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to weights
            self._memory = torch.from_numpy(np.frombuffer(mapping, np.uint8))

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        loan = msgspec.json.decode(self._get(f"weight/{self._n_kept}"), type=_Loan)
        self._n_kept += 1
        self.borrowed_bytes += loan.end - loan.begin
        return self._memory[loan.begin : loan.end].view(getattr(torch, loan.dtype)).view(loan.shape)

    def _get(self, key: str) -> bytes:
        try:
            self._store.wait([key], _PATIENCE)
            value: bytes = self._store.get(key)
        except RuntimeError as exc:
            raise EngineStartError(f"waited for weights from {self._lender}, which did not come ({exc})") from exc
        return value


def weight_memory(parallel: ParallelConfig, number: int, meet: Callable[[], Store]) -> WeightMemory:
    """Where rank `number`, on a CPU, keeps what it has in common with others; `meet` gives the store of its group."""
    numbers = topology.numbers_with_equal_weights(parallel, number)
    if len(numbers) == 1:
        return OwnMemory()
    store = PrefixStore(f"weights/{numbers[0]}", meet())
    if number == numbers[0]:
        return LentMemory(store, memory_bytes())
    lender = f"rank {numbers[0]}"
    try:
        return BorrowedMemory(store, lender)
    except OSError as error:
        log.warning("rank %d holds all its weights itself: it cannot reach those of %s: %s", number, lender, error)
        return OwnMemory()


class _Where(msgspec.Struct):
    """How the lender's memory is found."""

    pid: int
    descriptor: int
    inode: int
    n_bytes: int


class _Loan(msgspec.Struct):
    """One weight in the lender's memory."""

    begin: int
    end: int
    dtype: str
    shape: list[int]


def _want_huge_pages(mapping: mmap.mmap) -> None:
    """Spare address translations, where the kernel offers huge pages for shared memory."""
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        log.debug("no huge pages for shared weights: %s", error)
