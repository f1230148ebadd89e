"""A scripted stand-in for the engine, and a real HTTP server around it: tests drive the real app over real sockets.

Token ids are bytes, `BOS` and `EOS` come on top. The answer to a prompt is `script(prompt_ids, choice)`. A prompt that
ends in `DEADLY` kills the engine.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

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
from fastdeploy.entrypoints.openai.app import create_app
from fastdeploy.entrypoints.openai.state import ServerState, Slots
from fastdeploy.errors import ContextTooLong, EngineDeadError, EngineUnavailable, InvalidRequest
from fastdeploy.frontend.chat_template import ChatTemplate
from fastdeploy.frontend.detokenizer import TextRule
from fastdeploy.frontend.generation import ChoiceDelta
from fastdeploy.frontend.tokenizer import Tokenizer
from fastdeploy.observability.metrics import Metrics
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Pairing, RequestTimes, TokenLogprobs

BOS, EOS = 256, 257
VOCAB_SIZE = 258
DEADLY = b"die!"
MAX_MODEL_LEN = 512
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


class ByteBackend:
    """Every byte is a token."""

    rule = TextRule()
    vocab_size = VOCAB_SIZE
    special_ids = frozenset({BOS, EOS})

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [[BOS] * add_special_tokens + list(text.encode()) for text in texts]

    def id_of(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < 128 else None

    def token_bytes(self, token_id: int) -> bytes:
        return {BOS: b"<s>", EOS: b"</s>"}.get(token_id) or bytes([token_id])


def make_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(ByteBackend(), {"bos_token": "<s>", "eos_token": "</s>"}, (EOS,), template)


def make_config(max_logprobs: int = 5) -> EngineConfig:
    shape = ModelShape(
        architecture="FakeForCausalLM",
        family="llama",
        hidden_size=8,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        ffn_width=8,
        vocab_size=VOCAB_SIZE,
        max_positions=MAX_MODEL_LEN,
        norm_eps=1e-5,
        tied_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeShape(theta=1e4, style="half_split"),
    )
    model = ModelConfig(
        path="/models/fake",
        served_name="fake",
        shape=shape,
        dtype="float32",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
        sampling_defaults={},
    )
    return EngineConfig(
        model=model,
        cache=CacheConfig(),
        scheduler=SchedulerConfig(),
        parallel=ParallelConfig(),
        logprobs=LogprobsConfig(max_logprobs=max_logprobs),
        log_dir="log",
    )


def hello(prompt_ids: list[int], choice: int) -> Iterable[int]:
    """The default script: "hello" and the choice, then the end."""
    return [*f"hello{choice or ''}".encode(), EOS]


def logprob_of(token_id: int, rank_shift: int = 0) -> float:
    return -math.log1p(token_id % 7 + rank_shift)


def token_logprobs(token_id: int, n_top: int) -> TokenLogprobs:
    """The token itself is second; the first is the token after it."""
    top = [(token_id + 1) % 256, token_id, *range(1, n_top)][:n_top]
    return TokenLogprobs(token_id, logprob_of(token_id, 1), 2, top, [logprob_of(t) for t in top])


@dataclass
class FakeGenerator:
    """Has the methods of `fastdeploy.frontend.generation.Generator`; what it does is set by the test."""

    script: Callable[[list[int], int], Iterable[int]] = hello
    step_s: float = 0.0
    first_step_s: float = 0.0
    tokens_per_step: int = 1
    fail_after: int | None = None  # steps after which `failure` is raised
    failure: Exception = field(default_factory=lambda: RuntimeError("secret detail"))
    error_after: int | None = None  # steps after which the delta has finish reason "error"
    unhealthy: str | None = None
    config: EngineConfig = field(default_factory=make_config)
    tokenizer: Tokenizer = field(default_factory=make_tokenizer)
    metrics: Metrics = field(default_factory=Metrics)
    submitted: list[tuple[str, list[int], SamplingParams]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    n_closed: int = 0
    death: EngineDeadError | None = None
    _alive: dict[str, asyncio.Event] = field(default_factory=dict)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> SamplingParams:
        room = MAX_MODEL_LEN - len(prompt_ids)
        if room < 1:
            raise ContextTooLong(f"the prompt has {len(prompt_ids)} tokens; the limit is {MAX_MODEL_LEN}", "prompt")
        return params.resolved({}, room)

    def check_dp_rank(self, dp_rank: int | None) -> None:
        if dp_rank is not None:
            raise InvalidRequest("dp_rank needs a server with --scheduler-name dp", "dp_rank")

    def note(self) -> dict[str, str]:
        return {}

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        pairing: Pairing | None = None,
        dp_rank: int | None = None,
        output_ids: Sequence[int] = (),
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        self.submitted.append((request_id, prompt_ids, params))
        stop = self._alive[request_id] = asyncio.Event()
        try:
            answers = [self._answer(prompt_ids, params, i) for i in range(params.n)]
            await self._pause(self.first_step_s, stop)
            n_steps = 0
            while answers:
                if bytes(i % 256 for i in prompt_ids).endswith(DEADLY):
                    self.death = EngineDeadError("rank 0 was killed by signal 9")
                if self.death is not None:
                    raise EngineUnavailable(f"the engine stopped: {self.death}")
                if n_steps == self.fail_after:
                    raise self.failure
                deltas, answers = self._step(answers, stop.is_set(), n_steps == self.error_after)
                n_steps += 1
                yield deltas
                await self._pause(self.step_s, stop)
        finally:
            del self._alive[request_id]
            self.n_closed += 1

    async def _pause(self, seconds: float, stop: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(seconds):
                await stop.wait()
        except TimeoutError:
            return

    def _step(
        self, answers: list[Iterator[ChoiceDelta]], aborted: bool, failed: bool
    ) -> tuple[list[ChoiceDelta], list[Iterator[ChoiceDelta]]]:
        deltas, left = [], []
        for answer in answers:
            delta = next(answer)
            if aborted or failed:
                delta = end_of(delta, "abort" if aborted else "error")
            deltas.append(delta)
            if delta.finish_reason is None:
                left.append(answer)
        return deltas, left

    def _answer(self, prompt_ids: list[int], params: SamplingParams, choice: int) -> Iterator[ChoiceDelta]:
        ids = list(self.script(prompt_ids, choice))[: params.max_tokens]
        now_s = time.time()
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(token_logprobs(i, params.prompt_logprobs) for i in prompt_ids[1:])]
        decoder = self.tokenizer.text_stream(params.skip_special_tokens)
        for at in range(0, len(ids), self.tokens_per_step):
            new = ids[at : at + self.tokens_per_step]
            last = at + self.tokens_per_step >= len(ids)
            ended = new[-1] == EOS
            yield ChoiceDelta(
                index=choice,
                text=decoder.feed(new) + (decoder.finish() if last else ""),
                token_ids=new,
                logprobs=None if params.logprobs is None else [token_logprobs(i, params.logprobs) for i in new],
                finish_reason=("stop" if ended else "length") if last else None,
                stop_reason=EOS if ended else None,
                prompt_logprobs=prompt_logprobs if at == 0 else None,
                n_cached_tokens=len(prompt_ids) // 4,
                times=RequestTimes(now_s, now_s, now_s, 0.0) if at == 0 else None,
                error=None,
            )

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        found = [request_id for request_id in request_ids if request_id in self._alive]
        for request_id in found:
            self.aborted.append(request_id)
            self._alive[request_id].set()
        return found

    def health(self) -> str | None:
        return self.unhealthy

    async def died(self) -> EngineDeadError:
        while self.death is None:
            await asyncio.sleep(0.01)
        return self.death

    def alive_requests(self) -> list[str]:
        return list(self._alive)


def end_of(delta: ChoiceDelta, reason: str) -> ChoiceDelta:
    error = "a rank ran out of memory" if reason == "error" else None
    return ChoiceDelta(delta.index, "", [], None, reason, None, None, 0, None, error)


def make_state(fake: FakeGenerator, **fields: Any) -> ServerState:
    """A state in which `fake` is up; `fields` come first."""
    defaults: dict[str, Any] = {
        "config": fake.config,
        "metrics": fake.metrics,
        "slots": Slots(64),
        "chat_template": ChatTemplate(fake.tokenizer),
        "generator": fake,
    }
    return ServerState(**{**defaults, **fields})


class Served:
    """A running server: its address and what is behind it."""

    def __init__(self, url: str, state: ServerState, generator: FakeGenerator) -> None:
        self.url = url
        self.state = state
        self.generator = generator

    def wait_until(self, holds: Callable[[], bool], seconds: float = 20.0) -> None:
        """Polls until `holds`; fails when it never does."""
        deadline_s = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline_s, "it did not come to be"
            time.sleep(0.01)


@contextmanager
def serving(generator: FakeGenerator | None = None, **fields: Any) -> Iterator[Served]:
    """The real app under uvicorn on a free port, in a thread."""
    generator = generator or FakeGenerator()
    state = make_state(generator, **fields)
    config = uvicorn.Config(
        create_app(state), host="127.0.0.1", port=0, http="httptools", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline_s = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline_s, "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", state, generator)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
