"""Which steps are replayed from graphs, and how: the device path of a decode step. Imported only on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.config.schema import EngineConfig
from fastdeploy.layers.attention.base import GraphAttentionBackend
from fastdeploy.models.decoder import Decoder
from fastdeploy.runner.batch_state import BatchState, Grants
from fastdeploy.runner.cuda_graphs import DecodeGraphs
from fastdeploy.runner.decode_inputs import DecodeInputs
from fastdeploy.runner.graph_sizes import graph_sizes
from fastdeploy.runner.tokens import DeviceTokens
from fastdeploy.wire.messages import StepPlan

_CAPTURE_EVERY = 8  # launches between captures while serving


class CapturedSteps:
    """Decode steps of a rank from graphs."""

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder,
        backend: GraphAttentionBackend,
        pages_l: list[Tensor],
        state: BatchState,
        tokens: DeviceTokens,
        rotation_pd: Tensor,
    ) -> None:
        sizes, device = graph_sizes(config.scheduler.max_seqs), tokens.newest_s.device
        self._tokens = tokens
        self._inputs = DecodeInputs(state, tokens, rotation_pd, sizes[-1], device)
        self.graphs = DecodeGraphs(model, backend, pages_l, self._inputs, tokens, sizes, config.parallel.data)
        self._captures_ahead = config.parallel.group_size > 1
        self._n_since_capture = 0

    def take(self, plan: StepPlan) -> int | None:
        """Rows of the graph that the plan's step takes; None for a step that must run kernel by kernel."""
        size = self._size_for(plan)
        self._inputs.touch(start.slot for start in plan.starts)
        if size is None:
            self._inputs.touch(slot for slot, pages in zip(plan.slots, plan.new_pages, strict=True) if pages)
        return size

    def run(self, plan: StepPlan, grants: Grants, size: int) -> Tensor:
        """Final hidden states [size, H] of the plan's rows and of what fills up."""
        self._inputs.fill(grants, [bool(pages) for pages in plan.new_pages], size)
        return self.graphs.replay_body(size)

    def take_most_likely(self, slots: NDArray[np.int64], size: int) -> Callable[[], list[int]]:
        """Greedy tokens of what `run` gave, as `Tokens.append` and `Tokens.send` treat sampled ones."""
        token_ids_t = self.graphs.replay_tail(size)
        self._tokens.count(slots)
        return self._tokens.send(token_ids_t[: len(slots)])

    def capture_missing(self) -> None:
        """Capture a size that steps ask for, not more often than every few steps."""
        self._n_since_capture += 1
        if self.graphs.was_missed and not self._captures_ahead and self._n_since_capture >= _CAPTURE_EVERY:
            self.graphs.capture_next()
            self._n_since_capture = 0

    def _size_for(self, plan: StepPlan) -> int | None:
        if plan.agreement is not None:
            return plan.agreement.n_rows if plan.agreement.use_graph else None
        return self.graphs.fitting(len(plan.slots)) if plan.slots and is_decode(plan) else None


def is_decode(plan: StepPlan) -> bool:
    """Whether every grant is one token that is followed by a sampled one; such a slot gets one page at most."""
    return plan.n_tokens.count(1) == len(plan.n_tokens) and False not in plan.samples
