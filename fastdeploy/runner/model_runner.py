"""One step on a rank: take the plan in, lay out its tensors, run the model, sample.

On a GPU nothing here waits for the device: sampled ids stay there (`tokens.DeviceTokens`) and decode steps are replayed
from graphs (`captured.CapturedSteps`), so that a step can be launched while the one before it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.config.schema import EngineConfig
from fastdeploy.layers.attention.base import AttentionBackend, BatchLayout, GraphAttentionBackend
from fastdeploy.layers.rotary import rotations
from fastdeploy.models.decoder import Decoder
from fastdeploy.runner.batch_state import BatchState, Grants, StepInputs
from fastdeploy.runner.lender import Lender
from fastdeploy.runner.logprobs import PendingLogprobs, prompt_logprobs
from fastdeploy.runner.sampler import Sampler
from fastdeploy.runner.sampling_state import SamplingState, host_to_device
from fastdeploy.runner.step import StepContext
from fastdeploy.runner.tokens import DeviceTokens, HostTokens, Tokens
from fastdeploy.transfer.memory import PageMemory
from fastdeploy.wire.messages import PagesComputed, StepAgreement, StepPlan, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from fastdeploy.runner.captured import CapturedSteps
    from fastdeploy.runner.expert_balance import ExpertBalancer


class ModelRunner:
    """A rank's model, its pages and the requests in its slots. `borrowed_bytes` of its weights are another rank's."""

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder,
        backend: AttentionBackend,
        n_pages: int,
        borrowed_bytes: int = 0,
        memory: PageMemory | None = None,
        owner: str = "",
    ) -> None:
        """`memory`: the pages, where ranks of other servers may read them as those of `owner`; None: its own."""
        shape, self.config = config.model.shape, config
        self.device = torch.device(config.model.device)
        self.model = model
        self.backend = backend
        self.n_pages = n_pages
        self.memory = memory
        self.owner = owner
        self.lender: Lender | None = None
        self.balancer: ExpertBalancer | None = None  # with --enable-eplb
        if memory is None:
            self.pages_l = backend.allocate(n_pages)
        else:
            self.pages_l = [backend.view(memory.layer(layer)) for layer in range(shape.n_layers)]
        self.kv_bytes = backend.page_bytes() * n_pages
        self.weight_bytes = max(model.n_bytes() - borrowed_bytes, 0)  # borrowed ones count their padding
        max_slots, max_tokens = config.scheduler.max_seqs, config.model.max_model_len
        self.state = BatchState(max_slots, max_tokens, config.cache.page_tokens)
        self.sampling = SamplingState(max_slots, shape.vocab_size, self.device, config.model.eos_token_ids)
        self.sampler = Sampler(config.logprobs.mode)
        self.logprobs_mode = config.logprobs.mode
        self.rotation_pd = rotations(shape.rope, shape.head_dim, max_tokens, self.device)
        self.n_prompt_logprobs: dict[int, int] = {}  # slots that want log-probabilities of their prompt
        self._n_layers_done = 0
        for layer in model.layers:
            layer.register_forward_hook(self._count_layer)
        self.tokens: Tokens
        self._captured: CapturedSteps | None = None
        if self.device.type == "cpu":
            self.tokens = HostTokens(self.state)
            self._stream = None
        else:
            tokens = self.tokens = DeviceTokens(self.state, max_slots, self.device)
            self._stream = torch.cuda.Stream(self.device)
            if isinstance(backend, GraphAttentionBackend) and config.transfer.role != "prefill":
                self._captured = self._make_captured(backend, tokens)
            torch.cuda.synchronize(self.device)  # all of the above was written on another stream

    def lend(self, send: Callable[[PagesComputed], None]) -> None:
        """From now on offer the pages that plans order."""
        assert self.memory is not None, "only pages that others may read can be offered"
        self.lender = Lender(self.memory, self.owner, send, by_layer=self.device.type == "cpu")

    def layers_done(self) -> int:
        """Decoder layers computed since start: progress that a heartbeat can report."""
        return self._n_layers_done

    def rows_of_experts(self) -> dict[int, int]:
        """Rows that each expert on this rank has computed, over all layers; on a GPU they are not counted."""
        layers = self.model.sparse_layers()
        if not layers or layers[0].load_e is None:
            return {}
        loads = self.model.expert_loads().sum(0).tolist()
        return dict(enumerate(loads, layers[0].first_expert))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """On a GPU: compile kernels and capture the first decode steps, so that no request waits for it."""
        if self._captured is None:
            return
        with self._on_stream():
            # Kernels are compiled by kind of size: for few and many rows, and for multiples of 16 and other numbers.
            for n_seqs in self._captured.graphs.sizes:
                self._rehearse(n_seqs, 1)
            limit = min(self.config.scheduler.max_batched_tokens, self.config.model.max_model_len)
            for power in range(2, limit.bit_length()):
                self._rehearse(1, 1 << power)
                self._rehearse(1, (1 << power) - 1)
            if self.config.parallel.group_size > 1:
                self._captured.graphs.capture_all()
            else:
                self._captured.graphs.capture_first()
            if self.balancer is not None:
                self.balancer.start()
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def use_idle_time(self) -> bool:
        """Capture one more decode step; False when there is nothing left to do. For when nobody waits."""
        if self._captured is None or self.config.parallel.group_size > 1:
            return False
        with self._on_stream():
            return self._captured.graphs.capture_next()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Run a step; the function returned waits for what it sampled. It may be called from another thread."""
        lender = self.lender
        if lender is None or not plan.orders:
            return self._launch(plan)
        lender.begin(plan.orders)
        read = self._launch(plan)

        def result() -> StepResult:
            found = read()
            lender.finish()
            return found

        return result

    def _launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        with self._on_stream():
            if self.balancer is not None and plan.agreement is not None and plan.agreement.rearrange:
                self.balancer.rearrange()
            for start in plan.starts:
                self.state.start(start)
                self.sampling.start(start.slot, start.params, start.token_ids, start.n_prompt_tokens)
                self.n_prompt_logprobs.pop(start.slot, None)
                if start.params.prompt_logprobs is not None:
                    self.n_prompt_logprobs[start.slot] = start.params.prompt_logprobs
            self.tokens.start(plan.starts)
            grants = self.state.grant(plan)
            captured = self._captured
            if captured is not None:
                size = captured.take(plan)
                if size is not None:
                    return self._launch_captured(captured, plan, grants, size)
            return self._launch_eager(plan, grants)

    # ---- kernel by kernel ----------------------------------------------------------------------------------------

    def _launch_eager(self, plan: StepPlan, grants: Grants) -> Callable[[], StepResult]:
        inputs = self.state.inputs(grants, plan.agreement)
        hidden_tH = self._forward(inputs)
        sampling = np.flatnonzero(plan.samples)
        read, logprobs = None, None
        if len(sampling):
            row_r = host_to_device(inputs.row_s[sampling], self.device)
            logits_rV = self.model.logits(hidden_tH.index_select(0, row_r))
            read, logprobs = self._sample(grants.slot_s[sampling], logits_rV)
        of_prompts = self._prompt_logprobs(plan, inputs, hidden_tH) if self.n_prompt_logprobs else None
        return lambda: self._result(plan, read, logprobs, of_prompts)

    def _forward(self, inputs: StepInputs) -> Tensor:
        position_t = host_to_device(inputs.position_t, self.device)
        step = StepContext(
            rotation_td=self.rotation_pd.index_select(0, position_t),
            pages_l=self.pages_l,
            attention=self.backend.prepare(inputs.layout),
            agreement=inputs.agreement,
        )
        hidden_tH: Tensor = self.model(self.tokens.ids(inputs), step)
        return hidden_tH

    def _sample(
        self, slots: NDArray[np.int64], logits_rV: Tensor
    ) -> tuple[Callable[[], list[int]], PendingLogprobs | None]:
        """How to read the tokens that the slots take, and their log-probabilities."""
        n_output = self.state.n_known_s[slots] - self.state.n_prompt_s[slots]
        sampled = self.sampler.sample(logits_rV, self.sampling.batch(slots.tolist(), n_output.tolist()))
        self.tokens.append(slots, sampled.token_ids_s)
        return self.tokens.send(sampled.token_ids_s), sampled.logprobs

    # ---- from graphs ---------------------------------------------------------------------------------------------

    def _make_captured(self, backend: GraphAttentionBackend, tokens: DeviceTokens) -> CapturedSteps:
        # Triton, which the captured steps need, is there on GPUs only.
        from fastdeploy.runner.captured import CapturedSteps

        return CapturedSteps(self.config, self.model, backend, self.pages_l, self.state, tokens, self.rotation_pd)

    def _launch_captured(
        self, captured: CapturedSteps, plan: StepPlan, grants: Grants, size: int
    ) -> Callable[[], StepResult]:
        slots = grants.slot_s
        hidden_tH = captured.run(plan, grants, size)
        read, logprobs = None, None
        if len(slots):
            n_output = self.state.n_known_s[slots] - self.state.n_prompt_s[slots]
            if self.sampling.batch(slots.tolist(), n_output.tolist()).layout.plain_greedy:
                read = captured.take_most_likely(slots, size)
            else:
                read, logprobs = self._sample(slots, self.model.logits(hidden_tH[: len(slots)]))
        captured.capture_missing()
        return lambda: self._result(plan, read, logprobs, None, self.model.shape.n_layers)

    # ---- log-probabilities of prompts, results -------------------------------------------------------------------

    def _prompt_logprobs(
        self, plan: StepPlan, inputs: StepInputs, hidden_tH: Tensor
    ) -> dict[int, list[TokenLogprobs | None]]:
        """For each grant of a request that asked: the entries of the prompt tokens that follow its new positions."""
        found: dict[int, list[TokenLogprobs | None]] = {}
        for i, (slot, n_new) in enumerate(zip(plan.slots, plan.n_tokens, strict=True)):
            n_top = self.n_prompt_logprobs.get(slot)
            end = int(self.state.n_computed_s[slot])
            n_wanted = min(end, int(self.state.n_prompt_s[slot]) - 1) - (end - n_new)
            if n_top is None or n_wanted <= 0:
                continue
            first_row = int(inputs.row_s[i]) - n_new + 1
            logits_tV = self.model.logits(hidden_tH[first_row : first_row + n_wanted])
            next_ids = self.state.tokens_sn[slot, end - n_new + 1 : end - n_new + 1 + n_wanted].astype(np.int64)
            next_ids_t = host_to_device(next_ids, self.device)
            found[i] = list(prompt_logprobs(logits_tV, next_ids_t, n_top, self.logprobs_mode))
        return found

    def _result(
        self,
        plan: StepPlan,
        read: Callable[[], list[int]] | None,
        pending: PendingLogprobs | None,
        of_prompts: dict[int, list[TokenLogprobs | None]] | None,
        n_layers: int = 0,
    ) -> StepResult:
        token_ids = [-1] * len(plan.slots)
        logprobs: list[TokenLogprobs | None] | None = None
        if read is not None:
            found = read()
            if len(found) == len(token_ids):
                token_ids = found
            else:
                for grant, token_id in zip(np.flatnonzero(plan.samples).tolist(), found, strict=True):
                    token_ids[grant] = token_id
            if pending is not None:
                logprobs = [None] * len(plan.slots)
                for grant, entry in zip(np.flatnonzero(plan.samples).tolist(), pending.read(), strict=True):
                    logprobs[grant] = entry
        self._n_layers_done += n_layers  # a replayed graph calls no hooks
        return StepResult(plan.step, token_ids, logprobs, of_prompts or None)

    # ---- small things --------------------------------------------------------------------------------------------

    def _rehearse(self, n_seqs: int, n_new: int) -> None:
        """A step of sequences that nobody asked for, with `n_new` tokens each; it stores nothing."""
        n_pages, n_tokens = -(-n_new // self.config.cache.page_tokens), n_seqs * n_new
        n_new_s = np.full(n_seqs, n_new, np.int32)
        layout = BatchLayout(n_new_s, n_new_s, np.zeros((n_seqs, n_pages), np.int32), np.full(n_tokens, -1, np.int64))
        agreement = StepAgreement([n_tokens] * self.config.parallel.data, n_tokens, False)
        rotation_td = self.rotation_pd[:n_new].repeat(n_seqs, 1)
        step = StepContext(rotation_td, self.pages_l, self.backend.prepare(layout), agreement)
        hidden_tH = self.model(torch.zeros(n_tokens, dtype=torch.int64, device=self.device), step)
        self.model.logits(hidden_tH[-n_seqs:])

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _count_layer(self, *_: object) -> None:
        self._n_layers_done += 1
        if self.lender is not None:
            self.lender.layer_done()
