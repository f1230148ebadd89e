"""POST /v1/completions, as pure translation: request -> job, deltas -> choices or chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdeploy.entrypoints.openai.events import ChunkForm
from fastdeploy.entrypoints.openai.job import Job
from fastdeploy.entrypoints.openai.known_output import known_output
from fastdeploy.entrypoints.openai.logprobs import CompletionLogprobsWriter
from fastdeploy.entrypoints.openai.pairing import is_left_to_decode, pairing_of
from fastdeploy.entrypoints.openai.prompts import completion_prompts
from fastdeploy.entrypoints.openai.responses import Completion, CompletionChoice, CompletionLogprobs
from fastdeploy.entrypoints.openai.sampling import check_model, check_n_answers, completion_params, refuse_unsupported
from fastdeploy.entrypoints.openai.schema import CompletionRequest
from fastdeploy.entrypoints.openai.state import ServerState
from fastdeploy.errors import InvalidRequest

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import ChoiceDelta, Generator
    from fastdeploy.frontend.tokenizer import Tokenizer

_FORM = ChunkForm("text_completion", b',"text":', b"")


async def accept(
    request: CompletionRequest, request_id: str, state: ServerState, generator: Generator
) -> tuple[Job, CompletionAnswer]:
    """Checks a completions request and turns it into a job. Raises `RequestError`."""
    check_model(request.model, state.config, state.verify_model)
    refuse_unsupported(request)
    generator.check_dp_rank(request.dp_rank)
    if isinstance(request.suffix, str) and request.suffix:
        raise InvalidRequest("suffix (text after the completion) is not supported; leave it out", "suffix")
    params = completion_params(request, state.config, generator.tokenizer)
    prompts = await completion_prompts(request, state, generator.tokenizer)
    check_n_answers(len(prompts), params.n)
    job = Job(
        request_id=request_id,
        model=state.config.model.served_name,
        prompts=prompts,
        params=[generator.check(prompt.ids, params) for prompt in prompts],
        dp_rank=request.dp_rank,
        stream=bool(request.stream),
        return_token_ids=bool(request.return_token_ids),
        pairing=pairing_of(request, state.config),
        is_left_to_decode=is_left_to_decode(request, state.config),
        tokens_per_chunk=request.max_streaming_response_tokens or 1,
        prompt_only=request.max_tokens == 0,
    )
    job.output_ids = known_output(request, job, state.config.model.shape.vocab_size)
    job.set_stream_options(request.stream_options)
    return job, CompletionAnswer(job, request, generator.tokenizer)


class CompletionAnswer:
    """Deltas of a completions job as choices or as chunks; see `events.Answer`."""

    form = _FORM

    def __init__(self, job: Job, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._n_wanted = request.n or 1
        self._n_top = request.logprobs
        self._echo = bool(request.echo)
        self._writers: dict[int, CompletionLogprobsWriter] = {}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The prompt's token ids, when asked for."""
        if not self._job.return_token_ids:
            return None
        k = choice // self._job.n_choices
        return {"text": "", "prompt_token_ids": self._job.prompts[k].ids, "prompt_tokens": self._prompt_text(k)}

    def lead(self, choice: int) -> str:
        """The prompt, with `echo`."""
        return self._prompt_text(choice // self._job.n_choices) if self._echo else ""

    def logprobs(self, choice: int, delta: ChoiceDelta) -> CompletionLogprobs | None:
        """Lists for the tokens of `delta`, after those of the prompt where it brings them; None without."""
        if choice not in self._writers:
            self._writers[choice] = self._writer()
        return self._logprobs_of(choice // self._job.n_choices, self._writers[choice], delta)

    def _writer(self) -> CompletionLogprobsWriter:
        return CompletionLogprobsWriter(self._tokenizer, self._n_top or 0, self._job.params[0].skip_special_tokens)

    def _logprobs_of(self, k: int, writer: CompletionLogprobsWriter, delta: ChoiceDelta) -> CompletionLogprobs | None:
        if self._n_top is None or not (delta.logprobs or delta.prompt_logprobs):
            return None
        out = None
        if self._echo and delta.prompt_logprobs:
            out = writer.write(self._job.prompts[k].ids, delta.prompt_logprobs)
        return writer.write([entry.token_id for entry in delta.logprobs or []], delta.logprobs or [], out)

    def full(self, outputs: list[ChoiceDelta]) -> Completion:
        """The whole completion: of each prompt's answers the `n` best, where `best_of` made more."""
        job, n = self._job, self._job.n_choices
        choices: list[CompletionChoice] = []
        for k in range(len(job.prompts)):
            mine = outputs[k * n : (k + 1) * n]
            if n > self._n_wanted:
                mine = sorted(mine, key=_cumulative_logprob, reverse=True)[: self._n_wanted]
            for output in mine:
                choices.append(self._choice(k, len(choices), output))
        return Completion(job.request_id, int(job.created_s), job.model, choices, job.usage())

    def _choice(self, k: int, index: int, output: ChoiceDelta) -> CompletionChoice:
        text = self._prompt_text(k) + output.text if self._echo else output.text
        choice = CompletionChoice(index, text, output.finish_reason or "abort", stop_reason=output.stop_reason)
        choice.logprobs = self._logprobs_of(k, self._writer(), output)
        if self._job.return_token_ids:
            choice.prompt_token_ids = self._job.prompts[k].ids
            choice.completion_token_ids = output.token_ids
            choice.prompt_tokens = self._prompt_text(k)
            choice.completion_tokens = self._tokenizer.decode(output.token_ids, skip_special_tokens=False)
        return choice

    def _prompt_text(self, k: int) -> str:
        prompt = self._job.prompts[k]
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.ids, skip_special_tokens=self._job.params[0].skip_special_tokens)


def _cumulative_logprob(output: ChoiceDelta) -> float:
    return sum((entry.logprob for entry in output.logprobs or []), start=0.0)
