"""Decode steps as CUDA graphs: captured for a few numbers of rows at first, for the others while serving.

A captured step has two parts, body (token ids to hidden states) and tail (the most likely token of each row, stored as
its slot's newest), as sampled requests need the first only. All graphs take their memory from one pool: only one of
them runs at a time, and what one leaves behind is used before the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastdeploy.kernels.argmax import Argmax
from fastdeploy.layers.attention.base import GraphAttentionBackend
from fastdeploy.models.decoder import Decoder
from fastdeploy.runner.decode_inputs import DecodeInputs
from fastdeploy.runner.graph_sizes import first_sizes
from fastdeploy.runner.step import StepContext
from fastdeploy.runner.tokens import DeviceTokens
from fastdeploy.wire.messages import StepAgreement

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Captured:
    body: torch.cuda.CUDAGraph
    tail: torch.cuda.CUDAGraph
    hidden_tH: Tensor
    token_ids_t: Tensor
    step: StepContext  # its tensors must live as long as the graph


class DecodeGraphs:
    """Captures and replays; `sizes` ascending. A capture does not wait for the device, but takes some 0.1 s."""

    def __init__(
        self,
        model: Decoder,
        backend: GraphAttentionBackend,
        pages_l: list[Tensor],
        inputs: DecodeInputs,
        tokens: DeviceTokens,
        sizes: tuple[int, ...],
        n_replicas: int,
    ) -> None:
        self._model, self._backend, self._pages_l = model, backend, pages_l
        self._inputs, self._tokens = inputs, tokens
        self._n_replicas = n_replicas
        self._argmax = Argmax(sizes[-1], model.shape.vocab_size, tokens.newest_s.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[int, _Captured] = {}
        self._missing = list(reversed(sizes))
        self._wanted: int | None = None
        self.sizes = sizes

    def capture_first(self) -> None:
        """What must be there before the first request."""
        for size in first_sizes(self.sizes):
            self._capture(size)

    def capture_all(self) -> None:
        """Everything: ranks that run one collective together must never capture at a time of their own."""
        while self.capture_next():
            pass

    def capture_next(self) -> bool:
        """Capture the size that was missed last, or else the largest missing; False when none is."""
        if not self._missing:
            return False
        self._capture(self._wanted if self._wanted is not None else self._missing[0])
        return True

    @property
    def was_missed(self) -> bool:
        """Whether a step had to take a larger size than it needed."""
        return self._wanted is not None

    def fitting(self, n_rows: int) -> int | None:
        """The smallest captured size with room for that many rows, None when there is none."""
        best = next((size for size in self.sizes if size >= n_rows), None)
        if best is None or best in self._captured:
            return best
        self._wanted = best
        return min((size for size in self._captured if size >= n_rows), default=None)

    def replay_body(self, size: int) -> Tensor:
        """Run the layers over the rows that `DecodeInputs.fill` sent: [size, H], valid until the next replay."""
        captured = self._captured[size]
        captured.body.replay()
        return captured.hidden_tH

    def replay_tail(self, size: int) -> Tensor:
        """Take the most likely token of each row: int64 [size], valid until the next replay."""
        captured = self._captured[size]
        captured.tail.replay()
        return captured.token_ids_t

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        agreement = StepAgreement([size] * self._n_replicas, size, True)
        self._inputs.park(size)
        attention = self._backend.prepare_decode(self._inputs.batch(size))

        def body() -> tuple[Tensor, StepContext]:
            ids_t, rotation_td = self._inputs.begin(size)
            step = StepContext(rotation_td, self._pages_l, attention, agreement)
            return self._model(ids_t, step), step

        def tail(hidden_tH: Tensor) -> Tensor:
            logits_tV = self._model.logits(hidden_tH)
            return self._argmax(logits_tV, self._tokens.newest_s, self._inputs.write_slots(size))

        # Once outside: kernels are compiled and libraries take their memory.
        tail(body()[0])
        body_graph, (hidden_tH, step) = self._record(body)
        tail_graph, token_ids_t = self._record(lambda: tail(hidden_tH))
        self._captured[size] = _Captured(body_graph, tail_graph, hidden_tH, token_ids_t, step)
        self._missing.remove(size)
        if self._wanted == size:
            self._wanted = None

    def _record(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for events meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            made = work()
        finally:
            graph.capture_end()
        return graph, made
