"""A rank without a model, for tests of the scheduler: its next token is a function of all tokens before.

The rank remembers for every position of every page which beginning it was computed from, and refuses to read any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeploy.config.schema import (
    CacheConfig,
    EngineConfig,
    LogprobsConfig,
    ModelConfig,
    ModelShape,
    ParallelConfig,
    RopeShape,
    SchedulerConfig,
)
from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import Deltas, Scheduler
from fastdeploy.engine.step import PlannedStep
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import StepPlan, StepResult, Submit, TokenDelta, TokenLogprobs

VOCAB = 16
EOS = 1
CLIENT = b"front end"


def make_config(
    *,
    n_pages: int = 64,
    page_tokens: int = 4,
    max_model_len: int = 64,
    prefix_caching: bool = True,
    output_caching: bool = True,
    vocab_size: int = VOCAB,
    **limits: int | float | bool,
) -> EngineConfig:
    """A small engine; `limits` are fields of SchedulerConfig."""
    shape = ModelShape(
        architecture="Qwen3ForCausalLM",
        family="qwen3",
        hidden_size=8,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        ffn_width=8,
        vocab_size=vocab_size,
        max_positions=max_model_len,
        norm_eps=1e-6,
        tied_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=True,
        rope=RopeShape(theta=10000.0, style="half_split"),
    )
    model = ModelConfig(
        path="model",
        served_name="model",
        shape=shape,
        dtype="float32",
        device="cpu",
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        sampling_defaults={},
    )
    cache = CacheConfig(
        page_tokens=page_tokens, n_pages=n_pages, prefix_caching=prefix_caching, output_caching=output_caching
    )
    defaults: dict[str, int | float | bool] = {"max_seqs": 8, "max_batched_tokens": max(64, max_model_len)}
    return EngineConfig(
        model=model,
        cache=cache,
        scheduler=SchedulerConfig(**{**defaults, **limits}),  # type: ignore[arg-type]
        parallel=ParallelConfig(),
        logprobs=LogprobsConfig(),
        log_dir="log",
    )


def make_submit(request_id: str, prompt_ids: Sequence[int], max_tokens: int = 4, **params: object) -> Submit:
    """One greedy request that no token stops unless `ignore_eos=False` is given."""
    fields = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **params}
    return Submit(request_id, list(prompt_ids), SamplingParams(**fields), 1000.0)  # type: ignore[arg-type]


def make_submits(n: int, n_prompt: int = 8, max_tokens: int = 4, **params: object) -> list[Submit]:
    """`n` requests named "0", "1", … with different prompts."""
    return [
        make_submit(str(i), [(i + 1) * 5 % 13, *((i + j) % 11 for j in range(n_prompt - 1))], max_tokens, **params)
        for i in range(n)
    ]


def prefix_digest(digest: int, token_id: int) -> int:
    """Names a beginning that is one token longer."""
    return hash((digest, token_id))


def digests_of(token_ids: Sequence[int]) -> list[int]:
    """The digest of every beginning: entry i covers tokens 0..i."""
    digests, digest = [], 0
    for token_id in token_ids:
        digest = prefix_digest(digest, token_id)
        digests.append(digest)
    return digests


def next_token(digest: int, params: SamplingParams, n_output: int) -> int:
    """What the fake model takes after the beginning `digest`; stop tokens are masked before `min_tokens`."""
    token_id = (digest >> 7) % VOCAB
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
    while n_output + 1 < params.min_tokens and token_id in stops:
        token_id = (token_id + 1) % VOCAB
    return token_id


def expected_output(submit: Submit, config: EngineConfig) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that is alone in the world; the reference for everything else."""
    params, token_ids = submit.params, list(submit.prompt_ids)
    assert config.cache.n_pages is not None
    n_room = config.cache.n_pages * config.cache.page_tokens + 1
    n_limit = min(config.model.max_model_len, n_room, len(token_ids) + (params.max_tokens or 0))
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
    while True:
        n_output = len(token_ids) - len(submit.prompt_ids)
        token_ids.append(next_token(digests_of(token_ids)[-1], params, n_output))
        output = token_ids[len(submit.prompt_ids) :]
        if output[-1] in stops and len(output) >= params.min_tokens:
            return output, "stop"
        if len(token_ids) >= n_limit:
            return output, "length"


@dataclass
class _Slot:
    token_ids: list[int]
    digests: list[int]
    n_prompt: int
    n_computed: int
    pages: list[int]
    params: SamplingParams


@dataclass
class SimRank:
    """Executes plans in order."""

    page_tokens: int
    slots: dict[int, _Slot] = field(default_factory=dict)
    content: dict[int, int] = field(default_factory=dict)  # place in the cache -> digest of the beginning it holds

    def step(self, plan: StepPlan) -> StepResult:
        """Compute all grants; fails when a context is not the request's own, or two requests write one page."""
        for start in plan.starts:
            self.slots[start.slot] = _Slot(
                list(start.token_ids),
                digests_of(start.token_ids),
                start.n_prompt_tokens,
                start.n_computed,
                list(start.page_ids),
                start.params,
            )
        assert len(set(plan.slots)) == len(plan.slots), "two grants for one slot"
        writers: dict[int, int] = {}
        token_ids: list[int] = []
        prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        for i, (slot_id, n, samples, new) in enumerate(
            zip(plan.slots, plan.n_tokens, plan.samples, plan.new_pages, strict=True)
        ):
            slot = self.slots[slot_id]
            slot.pages += new
            first = slot.n_computed
            self._compute(slot_id, slot, n, writers)
            if slot.params.prompt_logprobs is not None and first + 1 < slot.n_prompt:
                seen = slot.token_ids[first + 1 : min(first + n + 1, slot.n_prompt)]
                prompt_logprobs[i] = [TokenLogprobs(token_id, -1.0, 1, [], []) for token_id in seen]
            token_ids.append(self._sample(slot) if samples else -1)
        logprobs = None
        if any(self.slots[s].params.logprobs is not None for s in plan.slots):
            logprobs = [
                TokenLogprobs(t, -0.5, 1, [], []) if t >= 0 and self.slots[s].params.logprobs is not None else None
                for s, t in zip(plan.slots, token_ids, strict=True)
            ]
        return StepResult(plan.step, token_ids, logprobs, prompt_logprobs or None)

    def _compute(self, slot_id: int, slot: _Slot, n: int, writers: dict[int, int]) -> None:
        size = self.page_tokens
        end = slot.n_computed + n
        assert n > 0 and end <= len(slot.token_ids), "granted tokens that do not exist"
        assert len(slot.pages) * size >= end, "granted tokens without a page"
        for position in range(slot.n_computed):
            place = slot.pages[position // size] * size + position % size
            assert self.content.get(place) == slot.digests[position], f"slot {slot_id} reads another's page"
        for position in range(slot.n_computed, end):
            page = slot.pages[position // size]
            assert writers.setdefault(page, slot_id) == slot_id, f"page {page} has two writers in one step"
            self.content[page * size + position % size] = slot.digests[position]
        slot.n_computed = end

    def _sample(self, slot: _Slot) -> int:
        assert slot.n_computed == len(slot.token_ids), "sampled before the last token"
        token_id = next_token(slot.digests[-1], slot.params, len(slot.token_ids) - slot.n_prompt)
        slot.token_ids.append(token_id)
        slot.digests.append(prefix_digest(slot.digests[-1], token_id))
        return token_id


@dataclass
class Answer:
    """All deltas of one request, put together."""

    token_ids: list[int] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    first_step: int = -1  # commit that brought the first token

    @property
    def reason(self) -> str | None:
        """Why it ended, if it did."""
        return self.deltas[-1].finish_reason if self.deltas else None


class Engine:
    """Scheduler and rank in a loop that plans up to `depth` steps before it commits the oldest."""

    def __init__(self, config: EngineConfig, depth: int = 1) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.rank = SimRank(config.cache.page_tokens)
        self.depth = depth
        self.in_flight: deque[tuple[PlannedStep, StepResult]] = deque()
        self.plans: list[PlannedStep] = []
        self.seen: dict[str, Request] = {}  # all that were ever granted something
        self.answers: dict[str, Answer] = {}
        self.n_commits = 0
        self.now_s = 1000.0

    def submit(self, *submits: Submit, client: bytes = CLIENT) -> None:
        """Hand requests to the scheduler."""
        for submit in submits:
            self.scheduler.submit(submit, client, self.now_s)
            self.answers[submit.request_id] = Answer()

    def receive(self, outputs: Deltas) -> None:
        """Add what a call of the scheduler gave."""
        for deltas in outputs.values():
            for delta in deltas:
                answer = self.answers[delta.request_id]
                assert answer.reason is None, f"{delta.request_id} goes on after its end"
                if delta.token_ids and answer.first_step < 0:
                    answer.first_step = self.n_commits
                answer.token_ids += delta.token_ids
                answer.deltas.append(delta)

    def plan(self) -> PlannedStep | None:
        """Plan one step, check it against the limits and let the rank compute it."""
        planned = self.scheduler.plan(self.now_s)
        self.check()
        if planned is not None:
            assert sum(planned.plan.n_tokens) <= self.config.scheduler.max_batched_tokens
            assert self.scheduler.status().n_running <= self.config.scheduler.max_seqs
            self.seen.update((request.id, request) for request in planned.requests)
            self._check_midway()
            self.plans.append(planned)
            self.in_flight.append((planned, self.rank.step(planned.plan)))
        return planned

    def check(self) -> None:
        """What holds between any two calls of the scheduler."""
        self.scheduler.pool.check()
        for r in self.seen.values():
            if r.slot >= 0:
                assert r.n_computed <= r.n_planned <= r.n_target < r.n_limit
                assert r.n_planned <= r.n_capacity == len(r.pages) * self.config.cache.page_tokens
                assert r.n_target <= len(r.token_ids) + r.n_in_flight

    def _check_midway(self) -> None:
        """Prompts left unfinished by all plans so far are as few as the limits say."""
        limits = self.config.scheduler
        # Every other running request has just been granted the token that it samples next.
        midway = [r for r in self.seen.values() if r.slot >= 0 and r.n_lacking > 0 and r.n_in_flight == 0]
        assert len(midway) <= (limits.max_partial_prefills if limits.chunked_prefill else 0)
        if limits.long_prefill_tokens:
            n_long = sum(request.n_target > limits.long_prefill_tokens for request in midway)
            assert n_long <= limits.max_long_partial_prefills

    def commit(self) -> None:
        """Commit the oldest step in flight."""
        planned, result = self.in_flight.popleft()
        self.n_commits += 1
        self.receive(self.scheduler.commit(planned, result, self.now_s))
        self.check()

    def turn(self) -> None:
        """Plan one step if the depth allows, else or if there is nothing to plan commit one."""
        self.now_s += 1.0
        planned = self.plan() if len(self.in_flight) < self.depth else None
        if planned is None or len(self.in_flight) == self.depth:
            assert self.in_flight or self.scheduler.idle, "nothing is planned, nothing is in flight, requests wait"
            if self.in_flight:
                self.commit()

    def run(self, max_turns: int = 2000) -> None:
        """Turn until every request has ended and every step is committed."""
        for _ in range(max_turns):
            if self.scheduler.idle and not self.in_flight:
                return
            self.turn()
        raise AssertionError(f"not done after {max_turns} turns")


def granted(engine: Engine) -> list[dict[str, int]]:
    """Tokens granted to each request, step by step."""
    return [
        {request.id: n for request, n in zip(planned.requests, planned.plan.n_tokens, strict=True)}
        for planned in engine.plans
    ]
