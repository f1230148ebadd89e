"""One step on a rank: take the plan in, lay out its tensors, run the model, sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdeploy.config.schema import EngineConfig
from fastdeploy.layers.attention.base import AttentionBackend
from fastdeploy.layers.rotary import rotations
from fastdeploy.models.decoder import Decoder
from fastdeploy.runner.batch_state import BatchState, StepInputs
from fastdeploy.runner.logprobs import prompt_logprobs
from fastdeploy.runner.sampler import Sampled, Sampler
from fastdeploy.runner.sampling_state import SamplingState
from fastdeploy.runner.step import StepContext
from fastdeploy.wire.messages import StepPlan, StepResult, TokenLogprobs


class ModelRunner:
    """A rank's model, its pages and the requests in its slots."""

    def __init__(self, config: EngineConfig, model: Decoder, backend: AttentionBackend, n_pages: int) -> None:
        shape = config.model.shape
        self.device = torch.device(config.model.device)
        self.model = model
        self.backend = backend
        self.n_pages = n_pages
        self.pages_l = backend.allocate(n_pages)
        self.kv_bytes = backend.page_bytes() * n_pages
        self.weight_bytes = model.n_bytes()
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

    def layers_done(self) -> int:
        """Decoder layers computed since start: progress that a heartbeat can report."""
        return self._n_layers_done

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Run a step; the function returned waits for what it sampled."""
        for start in plan.starts:
            self.state.start(start)
            self.sampling.start(start.slot, start.params, start.token_ids, start.n_prompt_tokens)
            self.n_prompt_logprobs.pop(start.slot, None)
            if start.params.prompt_logprobs is not None:
                self.n_prompt_logprobs[start.slot] = start.params.prompt_logprobs
        inputs = self.state.advance(plan)
        hidden_tH = self._forward(inputs)
        sampled = self._sample(plan, inputs, hidden_tH)
        of_prompts = self._prompt_logprobs(plan, inputs, hidden_tH) if self.n_prompt_logprobs else None
        return lambda: self._result(plan, sampled, of_prompts)

    def _forward(self, inputs: StepInputs) -> Tensor:
        position_t = torch.from_numpy(inputs.position_t).to(self.device)
        step = StepContext(
            rotation_td=self.rotation_pd.index_select(0, position_t),
            pages_l=self.pages_l,
            attention=self.backend.prepare(inputs.layout),
        )
        hidden_tH: Tensor = self.model(torch.from_numpy(inputs.ids_t).to(self.device), step)
        return hidden_tH

    def _sample(self, plan: StepPlan, inputs: StepInputs, hidden_tH: Tensor) -> Sampled | None:
        sampling = np.flatnonzero(plan.samples)
        if len(sampling) == 0:
            return None
        slots = np.asarray(plan.slots, np.int64)[sampling]
        row_r = torch.from_numpy(inputs.row_s[sampling]).to(self.device)
        logits_rV = self.model.logits(hidden_tH.index_select(0, row_r))
        n_output = self.state.n_known_s[slots] - self.state.n_prompt_s[slots]
        sampled = self.sampler.sample(logits_rV, self.sampling.batch(slots.tolist(), n_output.tolist()))
        self.state.append(slots, sampled.token_ids_s.cpu().numpy())
        return sampled

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
            next_ids_t = torch.from_numpy(next_ids).to(self.device)
            found[i] = list(prompt_logprobs(logits_tV, next_ids_t, n_top, self.logprobs_mode))
        return found

    def _result(
        self, plan: StepPlan, sampled: Sampled | None, of_prompts: dict[int, list[TokenLogprobs | None]] | None
    ) -> StepResult:
        token_ids = [-1] * len(plan.slots)
        logprobs: list[TokenLogprobs | None] | None = None
        if sampled is not None:
            grants = np.flatnonzero(plan.samples).tolist()
            for grant, token_id in zip(grants, sampled.token_ids_s.tolist(), strict=True):
                token_ids[grant] = token_id
            if sampled.logprobs is not None:
                logprobs = [None] * len(plan.slots)
                for grant, entry in zip(grants, sampled.logprobs.read(), strict=True):
                    logprobs[grant] = entry
        return StepResult(plan.step, token_ids, logprobs, of_prompts or None)

    def _count_layer(self, *_: object) -> None:
        self._n_layers_done += 1
