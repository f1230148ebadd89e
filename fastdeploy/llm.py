"""The library interface: the HTTP path without HTTP.

`LLM` runs the same front end as the server on an event loop in a background thread, and an engine core with its ranks
in processes of their own. They end with `close()`, with the `with` block, or with the interpreter, however it ends.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import queue
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

from fastdeploy.config.admission import resolve_admission
from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.errors import EngineUnavailable, InvalidRequest, RequestError
from fastdeploy.frontend.chat_template import ChatTemplate
from fastdeploy.frontend.generation import ChoiceDelta, Generator
from fastdeploy.frontend.launch import running_generator
from fastdeploy.frontend.meeting import group_address
from fastdeploy.observability.metrics import Metrics
from fastdeploy.observability.startup import StartupReport
from fastdeploy.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fastdeploy.sampling_params import SamplingParams

Result = TypeVar("Result")
Prompt = str | list[int] | Mapping[str, Any]

_MAX_SUBMITTED = 4096  # prompts in the engine's hands at once; the rest wait here


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt of a call, ready to be generated."""

    index: int
    request_id: str
    prompt: Any
    prompt_ids: list[int]
    params: SamplingParams


class InvalidTools(InvalidRequest, RuntimeError):
    """`tools` of a chat is no list of objects."""


class LLM:
    """A model that answers; several threads may ask it at once.

    `kwargs` are the server's engine flags with underscores (`max_model_len=8192`). Raises ConfigError,
    CheckpointError or EngineStartError when the model cannot be brought up.
    """

    def __init__(
        self,
        model: str,
        revision: str = "master",
        tokenizer: str | None = None,
        enable_logprob: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = EngineArgs.from_kwargs(
            model=model,
            revision=revision,
            tokenizer=tokenizer,
            enable_logprob=enable_logprob,
            chat_template=chat_template,
            **kwargs,
        )
        self.config = resolve(args)
        self._admission = resolve_admission(args)
        self._group = group_address(args)
        self.metrics = Metrics()
        self._request_numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastdeploy front end", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._thread, self._stack)
        # Before the interpreter tears its threads down, whatever still holds a reference to this object.
        atexit.register(self._finalizer)
        report = StartupReport()
        try:
            self._generator = self._run(self._start(report))
            report.on_ready(self.config, self._generator.ready, "")
            self._template = ChatTemplate(self._generator.tokenizer, chat_template)
        except BaseException:
            self.close()
            raise
        finally:
            report.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and its processes; calls that still run fail. A second call does nothing."""
        atexit.unregister(self._finalizer)
        self._finalizer()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answers in the order of the prompts; with `stream` an iterator of partial results as they come.

        A prompt is text, token ids, or a dict with the key "prompt". Raises ValueError (InvalidRequest) or TypeError
        for what is wrong with the call, before anything is generated, and EngineUnavailable when the engine is gone.
        """
        items = _as_list(prompts)
        params = _params_for(sampling_params, len(items), stream)
        jobs = [
            self._job(i, item, self._ids_of(item), p) for i, (item, p) in enumerate(zip(items, params, strict=True))
        ]
        return self._answer(jobs, use_tqdm, stream)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answers to one conversation or to a list of them; see `generate`. Raises RuntimeError for invalid `tools`."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = _params_for(sampling_params, len(conversations), stream)
        if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
            raise InvalidTools("tools must be a list of objects, each describing one function", "tools")
        options: dict[str, Any] = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        texts = [
            self._template.render(c, tools=tools, chat_template=chat_template, **options)  # type: ignore[arg-type]
            for c in conversations
        ]
        ids = self._generator.tokenizer.encode_batch(texts, add_special_tokens=False)
        jobs = [self._job(i, text, ids[i], params[i]) for i, text in enumerate(texts)]
        return self._answer(jobs, use_tqdm, stream)

    def _check_master(self) -> bool:
        """True where requests are taken: on the first machine of `ips`."""
        return 0 in self.config.parallel.serves

    def _ids_of(self, item: Any) -> list[int]:
        if isinstance(item, Mapping):
            if "prompt" not in item:
                raise ValueError(f"prompts: a dict needs the key 'prompt', got {sorted(item)}")
            unknown = sorted(set(item) - {"prompt"})
            if unknown:
                raise InvalidRequest(f"prompts: {unknown[0]!r} is not supported yet", "prompts")
            item = item["prompt"]
        if isinstance(item, str):
            return self._generator.tokenizer.encode(item)
        if isinstance(item, list) and all(type(i) is int for i in item):
            return item
        raise TypeError(
            f"prompts: expected text, a list of token ids, or a dict with 'prompt', got {type(item).__name__}"
        )

    def _job(self, index: int, prompt: Any, prompt_ids: list[int], params: SamplingParams) -> _Job:
        params = self._generator.check(prompt_ids, params)
        return _Job(index, f"offline-{next(self._request_numbers)}", prompt, prompt_ids, params)

    def _answer(self, jobs: list[_Job], use_tqdm: bool, stream: bool) -> list[RequestOutput] | Iterator[RequestOutput]:
        updates: queue.SimpleQueue[RequestOutput | BaseException | None] = queue.SimpleQueue()
        if not self._finalizer.alive:
            raise EngineUnavailable("this LLM was closed")
        order = jobs
        if self.config.parallel.data > 1:  # what is placed last evens out what came before: the shortest answers do
            order = sorted(jobs, key=lambda job: job.params.max_tokens or 0, reverse=True)
        running = asyncio.run_coroutine_threadsafe(_answer_all(self._generator, order, updates, stream), self._loop)
        if stream:
            return _stream(updates, running)
        return _collect(updates, running, len(jobs), use_tqdm)

    async def _start(self, report: StartupReport) -> Generator:
        running = running_generator(
            self.config, self.metrics, report.on_progress, group=self._group, admission=self._admission
        )
        return await self._stack.enter_async_context(running)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _shut_down(loop: asyncio.AbstractEventLoop, thread: threading.Thread, stack: AsyncExitStack) -> None:
    """Stop the engine, then the loop and its thread."""
    if thread is threading.current_thread():  # it happened to collect the garbage, and cannot wait for itself
        threading.Thread(target=_shut_down, args=(loop, thread, stack)).start()
        return
    if thread.is_alive():
        try:
            asyncio.run_coroutine_threadsafe(_end_all(stack), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
    loop.close()


async def _end_all(stack: AsyncExitStack) -> None:
    """Stop the engine, also one that is still starting, and let every call notice."""
    await stack.aclose()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _answer_all(generator: Generator, jobs: list[_Job], updates: queue.SimpleQueue[Any], stream: bool) -> None:
    """Generate all jobs at once; results go to `updates` as they come, None at the end."""
    slots = asyncio.Semaphore(_MAX_SUBMITTED)

    async def one(job: _Job) -> None:
        async with slots:
            output = _empty_output(job)
            try:
                async for deltas in generator.generate(job.request_id, job.prompt_ids, job.params):
                    for delta in deltas:
                        _merge(output, delta)
                    if stream and not all(choice.finish_reason for choice in output.all_outputs):
                        updates.put(_snapshot(output))
            except EngineUnavailable:
                raise
            except RequestError as error:
                output.error_code, output.error_msg = error.status, error.message
            output.finished = True
            updates.put(output)

    try:
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                tasks.create_task(one(job))
    except* Exception as group:  # whatever it was, the caller is waiting for it
        updates.put(group.exceptions[0])
    finally:
        updates.put(None)


def _empty_output(job: _Job) -> RequestOutput:
    choices = [CompletionOutput(index=i) for i in range(job.params.n)]
    for choice in choices:
        choice.logprobs = None if job.params.logprobs is None else []
    return RequestOutput(str(job.index), job.prompt, job.prompt_ids, choices)


def _merge(output: RequestOutput, delta: ChoiceDelta) -> None:
    choice = output.all_outputs[delta.index]
    choice.text += delta.text
    choice.token_ids += delta.token_ids
    if choice.logprobs is not None:
        choice.logprobs += delta.logprobs or []
    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
    choice.send_idx += 1
    output.num_cached_tokens = delta.n_cached_tokens
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = delta.prompt_logprobs
    if delta.times is not None:
        output.metrics = RequestMetrics.of(delta.times)
    if delta.error is not None:
        output.error_code, output.error_msg = 500, delta.error


def _snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that later merges leave alone."""
    frozen = copy(output)
    frozen.all_outputs = [copy(choice) for choice in output.all_outputs]
    for choice in frozen.all_outputs:
        choice.token_ids = list(choice.token_ids)
        choice.logprobs = choice.logprobs and list(choice.logprobs)
    return frozen


def _stream(updates: queue.SimpleQueue[Any], running: Any) -> Iterator[RequestOutput]:
    """Partial and finished results; leaving the loop early aborts what still runs."""
    try:
        while (update := updates.get()) is not None:
            if isinstance(update, BaseException):
                raise update
            yield update
    finally:
        running.cancel()


def _collect(updates: queue.SimpleQueue[Any], running: Any, n_jobs: int, use_tqdm: bool) -> list[RequestOutput]:
    from tqdm import tqdm

    done: dict[int, RequestOutput] = {}
    n_tokens = 0
    try:
        with tqdm(total=n_jobs, desc="prompts", unit="prompt", disable=not use_tqdm) as bar:
            for output in _stream(updates, running):
                done[int(output.request_id)] = output
                n_tokens += sum(len(choice.token_ids) for choice in output.all_outputs)
                rate = n_tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:.0f} output tokens/s", refresh=False)
                bar.update()
    except BaseException:
        running.cancel()
        raise
    return [done[i] for i in range(n_jobs)]


def _params_for(params: Any, n_prompts: int, stream: bool) -> list[SamplingParams]:
    """One SamplingParams for each prompt. Raises ValueError and TypeError."""
    if params is None:
        params = SamplingParams()
    found = [params] * n_prompts if isinstance(params, SamplingParams) else params
    if not isinstance(found, list | tuple) or not all(isinstance(one, SamplingParams) for one in found):
        raise TypeError(f"sampling_params: expected SamplingParams or a list of them, got {type(params).__name__}")
    if len(found) != n_prompts:
        raise ValueError(f"sampling_params: {len(found)} given for {n_prompts} prompts; give one, or one for each")
    if stream and any(one.prompt_logprobs is not None for one in found):
        raise InvalidRequest(
            "prompt_logprobs cannot be streamed; leave out stream or prompt_logprobs", "prompt_logprobs"
        )
    return list(found)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt in any form, or a list of them, as a list."""
    if isinstance(prompts, (str, Mapping)) or (isinstance(prompts, list) and prompts and type(prompts[0]) is int):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected text, token ids, a dict or a list of these, got {type(prompts).__name__}")
    return list(prompts)
