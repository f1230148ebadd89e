"""One HTTP generation request between its checks and its answer: prompts, parameters, token counts, steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fastdeploy.entrypoints.openai.prompts import Prompt
from fastdeploy.entrypoints.openai.responses import CompletionTokensDetails, PromptTokensDetails, UsageInfo
from fastdeploy.entrypoints.openai.schema import StreamOptions
from fastdeploy.entrypoints.openai.state import LiveRequest
from fastdeploy.errors import RequestError
from fastdeploy.frontend.generation import ChoiceDelta
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Pairing

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import Generator

# What one engine step brought to one prompt: the prompt's position in the request, and its deltas.
Step = tuple[int, list[ChoiceDelta]]


class GenerationFailed(RequestError):
    """The engine gave up a request that it had accepted."""

    status = 500
    kind = "internal_error"
    code = "internal_error"


@dataclass(slots=True, kw_only=True)
class Job:
    """`params.n` answers are generated for each of `prompts`; choice i of prompt k has index k * params.n + i."""

    request_id: str
    model: str
    prompts: list[Prompt]
    params: list[SamplingParams]  # one per prompt: what is left of the context may differ
    dp_rank: int | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    tokens_per_chunk: int = 1
    prompt_only: bool = False  # the client wants the prompt's log-probabilities and no output
    pairing: Pairing | None = None
    is_left_to_decode: bool = False  # another server computes all of it; whoever asked drops this one's answer
    output_ids: list[int] = field(default_factory=list)  # the answer begins with them
    created_s: float = field(default_factory=time.time)
    n_completion_tokens: int = 0
    n_cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_step_s: float | None = None

    @property
    def n_choices(self) -> int:
        """Answers of one prompt."""
        return self.params[0].n

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def usage(self) -> UsageInfo:
        """The token counts so far."""
        n_prompt, n_completion = self.n_prompt_tokens, self.n_completion_tokens
        return UsageInfo(
            n_prompt,
            n_prompt + n_completion,
            n_completion,
            PromptTokensDetails(self.n_cached_tokens),
            CompletionTokensDetails(),
        )

    def set_stream_options(self, options: StreamOptions | None) -> None:
        """`stream_options` that are there switch the usage chunk on unless they say otherwise."""
        if options is not None:
            self.include_usage = options.include_usage is not False
            self.continuous_usage = bool(options.continuous_usage_stats)

    async def steps(self, generator: Generator, live: LiveRequest) -> AsyncGenerator[Step, None]:
        """Runs the job; every step is counted. Closing the iterator aborts what still runs.

        Raises `GenerationFailed` when the engine gives up one of the answers.
        """
        if self.is_left_to_decode:
            self.finish_reasons.append("length")
            yield 0, [ChoiceDelta(0, "", [], None, "length", None, None, 0, None, None)]
            return
        streams = [
            generator.generate(engine_id, prompt.ids, params, self.pairing, self.dp_rank, self.output_ids)
            for engine_id, prompt, params in zip(live.engine_ids, self.prompts, self.params, strict=True)
        ]
        seen: set[int] = set()
        async with aclosing(_merged(streams)) as merged:
            async for k, deltas in merged:
                if self.first_step_s is None:
                    self.first_step_s = time.time()
                if k not in seen:
                    seen.add(k)
                    self.n_cached_tokens += deltas[0].n_cached_tokens if deltas else 0
                if self.prompt_only:
                    deltas = [_without_output(delta) for delta in deltas]
                for delta in deltas:
                    if delta.finish_reason == "error":
                        raise GenerationFailed(delta.error or "the engine could not finish this request")
                    self.n_completion_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        self.finish_reasons.append(delta.finish_reason)
                live.n_generated = self.n_completion_tokens
                yield k, deltas


def _without_output(delta: ChoiceDelta) -> ChoiceDelta:
    finish = "length" if delta.finish_reason == "stop" else delta.finish_reason
    return replace(delta, text="", token_ids=[], logprobs=None, finish_reason=finish, stop_reason=None)


async def _merged(streams: list[AsyncGenerator[list[ChoiceDelta], None]]) -> AsyncGenerator[Step, None]:
    """The steps of several prompts as they come; the first failure is raised and ends the others."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for deltas in only:
                yield 0, deltas
        return
    arrived: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()

    async def pump(k: int, stream: AsyncGenerator[list[ChoiceDelta], None]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(stream):
                async for deltas in stream:
                    arrived.put_nowait((k, deltas))
        except Exception as exc:
            end = exc
        arrived.put_nowait(end)

    pumps = [asyncio.create_task(pump(k, stream)) for k, stream in enumerate(streams)]
    try:
        n_open = len(pumps)
        while n_open:
            item = await arrived.get()
            if item is None:
                n_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
