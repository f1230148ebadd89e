"""An engine inside the test process: scheduler and runner in a loop, without processes, sockets or a tokenizer.

Steps are launched ahead as the engine core does it: with `steps_in_flight=n`, up to n plans are on the runner before
the result of the oldest is read and committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import CacheConfig, EngineConfig, ModelShape, SchedulerConfig, with_measured_pages
from fastdeploy.engine.scheduler import Deltas, Scheduler
from fastdeploy.engine.step import PlannedStep
from fastdeploy.runner.build import build_runner
from fastdeploy.runner.model_runner import ModelRunner
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import FinishReason, StepResult, Submit, TokenLogprobs

CLIENT = b"test"


def engine_config(
    folder: Path,
    *,
    max_model_len: int = 160,
    page_tokens: int = 16,
    n_pages: int | None = None,
    prefix_caching: bool = True,
    shape: ModelShape | None = None,
    quantization: str | None = None,
    **limits: Any,
) -> EngineConfig:
    """A float32 engine on the CPU. `limits` are fields of SchedulerConfig; no `n_pages` is room for all slots.

    `shape` replaces what config.json says. Limits that only the command line refuses are allowed here: a step may have
    fewer tokens than a page.
    """
    args = EngineArgs(
        model=str(folder), device="cpu", dtype="float32", max_model_len=max_model_len, quantization=quantization
    )
    config = resolve(args)
    scheduler = SchedulerConfig(**{"steps_in_flight": 1, "max_batched_tokens": 2048, **limits})
    if n_pages is None:
        n_pages = (-(-max_model_len // page_tokens) + 1) * scheduler.max_seqs
    return replace(
        config,
        model=replace(config.model, shape=shape or config.model.shape),
        cache=CacheConfig(page_tokens=page_tokens, n_pages=n_pages, prefix_caching=prefix_caching),
        scheduler=scheduler,
    )


@dataclass
class Answer:
    """What one request got."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    n_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    logits_pV: Tensor | None = None  # float32, of every position computed; NaN where the prefix cache spared it


class InProcessEngine:
    """Serves requests with a real model; `keep_logits` records the logits of every position that is computed."""

    def __init__(self, config: EngineConfig, *, keep_logits: bool = False) -> None:
        self.runner: ModelRunner
        self.runner, _ = build_runner(config)
        self.config = with_measured_pages(config, self.runner.n_pages)
        self.scheduler = Scheduler(self.config)
        self.answers: dict[str, Answer] = {}
        self.now_s = 0.0
        self._in_flight: deque[tuple[PlannedStep, Callable[[], StepResult]]] = deque()
        self._hidden_tH: Tensor | None = None
        if keep_logits:
            self.runner.model.register_forward_hook(self._keep_hidden)

    def submit(self, prompt_ids: Sequence[int], **params: Any) -> Answer:
        """Queue one request: greedy, 8 tokens and no stop token unless `params` say otherwise."""
        request_id = str(len(self.answers))
        wanted: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "seed": 0, **params}
        resolved = SamplingParams(**wanted).resolved({}, 8)
        self.scheduler.submit(Submit(request_id, list(prompt_ids), resolved, self.now_s), CLIENT, self.now_s)
        answer = self.answers[request_id] = Answer(list(prompt_ids))
        return answer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[dict[str, Any]] | None = None,
        arrive_at: Sequence[int] | None = None,
        **common: Any,
    ) -> list[Answer]:
        """Serve all prompts; `params` are those of single requests, `arrive_at` the turns at which they come."""
        turns = arrive_at or [0] * len(prompts)
        answers: list[Answer | None] = [None] * len(prompts)
        for turn in range(max(turns) + 1):
            for i, prompt in enumerate(prompts):
                if turns[i] == turn:
                    answers[i] = self.submit(prompt, **common, **(params[i] if params else {}))
            self.turn()
        self.run()
        return [answer for answer in answers if answer is not None]

    def run(self) -> None:
        """Turn until every request has ended and every step is committed."""
        for _ in range(100_000):
            if self.scheduler.idle and not self._in_flight:
                return
            self.turn()
        raise AssertionError("requests do not end")

    def turn(self) -> None:
        """Launch one step if there may be one more in flight; commit the oldest if there may not, or nothing to do."""
        self.now_s += 1.0
        planned = None
        if len(self._in_flight) < self.config.scheduler.steps_in_flight:
            planned = self.scheduler.plan(self.now_s)
        if planned is not None:
            self._in_flight.append((planned, self.runner.launch(planned.plan)))
            self._keep_logits(planned)
        if self._in_flight and (planned is None or len(self._in_flight) == self.config.scheduler.steps_in_flight):
            oldest, read = self._in_flight.popleft()
            self._receive(self.scheduler.commit(oldest, read(), self.now_s))
            self.scheduler.pool.check()

    def _receive(self, outputs: Deltas) -> None:
        for delta in outputs.get(CLIENT, []):
            assert delta.error is None, delta.error
            answer = self.answers[delta.request_id]
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.finish_reason = delta.finish_reason
            answer.n_cached_tokens = delta.n_cached_tokens
            if delta.prompt_logprobs is not None:
                answer.prompt_logprobs = delta.prompt_logprobs

    def _keep_hidden(self, _module: object, _inputs: object, hidden_tH: Tensor) -> None:
        self._hidden_tH = hidden_tH

    def _keep_logits(self, planned: PlannedStep) -> None:
        if self._hidden_tH is None:
            return
        with torch.inference_mode():
            logits_tV = self.runner.model.logits(self._hidden_tH).clone()
        row = 0
        for request, slot, n_new in zip(planned.requests, planned.plan.slots, planned.plan.n_tokens, strict=True):
            answer, end = self.answers[request.id], int(self.runner.state.n_computed_s[slot])
            if answer.logits_pV is None:
                answer.logits_pV = logits_tV.new_full((self.config.model.max_model_len, logits_tV.shape[1]), torch.nan)
            answer.logits_pV[end - n_new : end] = logits_tV[row : row + n_new]
            row += n_new
