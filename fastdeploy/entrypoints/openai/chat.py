"""POST /v1/chat/completions, as pure translation: request -> job, deltas -> message or chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdeploy.entrypoints.openai.events import ChunkForm
from fastdeploy.entrypoints.openai.job import Job
from fastdeploy.entrypoints.openai.known_output import known_output
from fastdeploy.entrypoints.openai.logprobs import chat_logprobs
from fastdeploy.entrypoints.openai.pairing import is_left_to_decode, pairing_of
from fastdeploy.entrypoints.openai.prompts import chat_prompt
from fastdeploy.entrypoints.openai.responses import ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage
from fastdeploy.entrypoints.openai.sampling import chat_params, check_model, check_n_answers, refuse_unsupported
from fastdeploy.entrypoints.openai.schema import ChatRequest
from fastdeploy.entrypoints.openai.state import ServerState
from fastdeploy.errors import InvalidRequest, RequestError

if TYPE_CHECKING:
    from fastdeploy.frontend.generation import ChoiceDelta, Generator
    from fastdeploy.frontend.tokenizer import Tokenizer

_FORM = ChunkForm("chat.completion.chunk", b',"delta":{"content":', b"}")


async def accept(
    request: ChatRequest, request_id: str, state: ServerState, generator: Generator
) -> tuple[Job, ChatAnswer]:
    """Checks a chat request and turns it into a job. Raises `RequestError`."""
    check_model(request.model, state.config, state.verify_model)
    refuse_unsupported(request)
    generator.check_dp_rank(request.dp_rank)
    if request.tools and request.tool_choice != "none":
        raise InvalidRequest(
            "tools is not supported yet: tool calls cannot be read out of the answer; leave it out "
            "or send tool_choice='none'",
            "tools",
        )
    params = chat_params(request, state.config, generator.tokenizer)
    check_n_answers(1, params.n)
    prompt = await chat_prompt(request, state, generator.tokenizer)
    try:
        params = generator.check(prompt.ids, params)
    except RequestError as exc:
        exc.param = "messages" if exc.param == "prompt" else exc.param  # the field that a chat request has for it
        raise
    job = Job(
        request_id=request_id,
        model=state.config.model.served_name,
        prompts=[prompt],
        params=[params],
        dp_rank=request.dp_rank,
        stream=bool(request.stream),
        return_token_ids=bool(request.return_token_ids),
        pairing=pairing_of(request, state.config),
        is_left_to_decode=is_left_to_decode(request, state.config),
        tokens_per_chunk=request.max_streaming_response_tokens or 1,
    )
    job.output_ids = known_output(request, job, state.config.model.shape.vocab_size)
    job.set_stream_options(request.stream_options)
    return job, ChatAnswer(job, generator.tokenizer)


class ChatAnswer:
    """Deltas of a chat job as a message or as chunks; see `events.Answer`."""

    form = _FORM

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer

    def opening(self, choice: int) -> dict[str, Any]:
        """Role and empty content, as OpenAI's first chunk."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._job.return_token_ids:
            delta |= {"prompt_token_ids": self._job.prompts[0].ids, "prompt_tokens": self._prompt_text()}
        return {"delta": delta}

    def lead(self, choice: int) -> str:
        """Nothing comes before an answer."""
        return ""

    def logprobs(self, choice: int, delta: ChoiceDelta) -> ChatLogprobs | None:
        """Records for the tokens of `delta`; None without."""
        if not delta.logprobs:
            return None
        return chat_logprobs(delta.logprobs, self._tokenizer, self._job.params[0].logprobs or 0)

    def full(self, outputs: list[ChoiceDelta]) -> ChatCompletion:
        """The whole chat completion."""
        job = self._job
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return ChatCompletion(job.request_id, int(job.created_s), job.model, choices, job.usage())

    def _choice(self, index: int, output: ChoiceDelta) -> ChatChoice:
        message = ChatMessage(output.text)
        if self._job.return_token_ids:
            message.prompt_token_ids = self._job.prompts[0].ids
            message.completion_token_ids = output.token_ids
            message.prompt_tokens = self._prompt_text()
            message.completion_tokens = self._tokenizer.decode(output.token_ids, skip_special_tokens=False)
        return ChatChoice(
            index,
            message,
            output.finish_reason or "abort",
            logprobs=self.logprobs(index, output),
            stop_reason=output.stop_reason,
        )

    def _prompt_text(self) -> str:
        prompt = self._job.prompts[0]
        return self._tokenizer.decode(prompt.ids, skip_special_tokens=False) if prompt.text is None else prompt.text
