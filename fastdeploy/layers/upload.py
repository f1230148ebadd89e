"""Weights on their way to a device: several threads read and convert into pinned memory, copies run beside them.

A plain copy from a mapped file runs at the speed of one thread that takes page faults; this runs at the bus's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

_N_THREADS = 8
_PIECE_BYTES = 8 << 20


class Uploader:
    """Fills tensors of one device in the background; they are complete when the `with` block ends.

    An error of a reading thread is raised there too.
    """

    def __init__(self, device: torch.device, n_threads: int = _N_THREADS) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="upload")
        self._pending: list[Future[None]] = []
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        if device.type == "cuda":
            for _ in range(n_threads):
                self._lanes.put(_Lane(device))

    def __enter__(self) -> Uploader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        while not self._lanes.empty():
            self._lanes.get().finish()
        if error is None:
            for future in self._pending:
                future.result()

    def put(self, target: Tensor, read: Callable[[], Tensor]) -> None:
        """Fill `target` with what `read` returns, converted to its dtype. `read` runs in another thread."""
        self._pending.append(self._pool.submit(self._fill, target, read))

    @torch.inference_mode()
    def _fill(self, target: Tensor, read: Callable[[], Tensor]) -> None:
        if self._device.type != "cuda":
            target.copy_(read())
            return
        lane = self._lanes.get()
        try:
            source = read()
            if source.is_cuda:  # made there
                target.copy_(source)
                torch.cuda.current_stream(source.device).synchronize()
            else:
                lane.fill(target, source)
        finally:
            self._lanes.put(lane)


class _Lane:
    """One thread's two pinned buffers and its stream: one buffer is filled while the other is copied from."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._buffers = [torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._n_pieces = 0

    def fill(self, target: Tensor, source: Tensor) -> None:
        """Queue the copies of all rows; `source` may be let go of afterwards."""
        if not target.numel():
            return
        n_rows = max(1, _PIECE_BYTES // (target[0].numel() * target.element_size()))
        for first in range(0, target.shape[0], n_rows):
            part = target[first : first + n_rows]
            n_bytes = part.numel() * part.element_size()
            turn = self._n_pieces & 1
            self._n_pieces += 1
            if n_bytes > _PIECE_BYTES:  # one row larger than a buffer
                self._buffers[turn] = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
            else:
                self._copied[turn].synchronize()
            staged = self._buffers[turn][:n_bytes].view(target.dtype).view(part.shape)
            staged.copy_(source[first : first + n_rows])
            with torch.cuda.stream(self._stream):
                part.copy_(staged, non_blocking=True)
                self._copied[turn].record(self._stream)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        self._stream.synchronize()
