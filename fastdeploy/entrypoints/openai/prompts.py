"""From the fields of a request to prompts: texts, conversations or token ids in, token ids out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastdeploy.entrypoints.openai.sampling import check_token_ids
from fastdeploy.entrypoints.openai.schema import MAX_PROMPTS, ChatRequest, CompletionRequest
from fastdeploy.entrypoints.openai.state import ServerState
from fastdeploy.errors import ContextTooLong, EngineUnavailable, InvalidRequest, MissingField

if TYPE_CHECKING:
    from fastdeploy.frontend.tokenizer import Tokenizer

INLINE_CHARS = 16384  # a longer text is tokenised in a thread, so that other streams go on meanwhile
MAX_CHARS_PER_TOKEN = 512  # no vocabulary has longer tokens: a text beyond this cannot fit, whatever its tokens are

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one prompt; `text` is None when the client sent ids."""

    ids: list[int]
    text: str | None


async def encode(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_model_len: int, param: str = "prompt"
) -> list[int]:
    """Token ids of a text. Raises `ContextTooLong` for a text that cannot fit whatever its tokens are."""
    if len(text) > max_model_len * MAX_CHARS_PER_TOKEN:
        raise ContextTooLong(
            f"the prompt has {len(text)} characters, far beyond this model's maximum context length "
            f"of {max_model_len} tokens",
            param,
        )
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def chat_prompt(request: ChatRequest, state: ServerState, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a chat request.

    Token ids (`prompt_token_ids`, or `messages` as ids) are used as they are; `disable_chat_template` takes the first
    message's content as the text. Raises `InvalidRequest` and `ContextTooLong`.
    """
    vocab_size = state.config.model.shape.vocab_size
    if request.prompt_token_ids is not None:
        return _of_ids(request.prompt_token_ids, vocab_size, "prompt_token_ids")
    ids = [message for message in request.messages if isinstance(message, int)]
    if ids:
        if len(ids) != len(request.messages):
            raise InvalidRequest("messages must be all objects or all token ids, not a mix", "messages")
        return _of_ids(ids, vocab_size, "messages")
    messages = [message for message in request.messages if isinstance(message, dict)]
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    max_model_len = state.config.model.max_model_len
    if request.disable_chat_template:
        text = messages[0].get("content")
        if not isinstance(text, str):
            raise InvalidRequest("messages[0].content must be a string with disable_chat_template", "messages")
        return _checked(await encode(tokenizer, text, True, max_model_len, "messages"), text, "messages")
    text = await render_chat(messages, state, request.chat_template_kwargs, request.chat_template)
    return _checked(await encode(tokenizer, text, False, max_model_len, "messages"), text, "messages")


async def completion_prompts(request: CompletionRequest, state: ServerState, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a completions request, in order. Raises `InvalidRequest` and `ContextTooLong`."""
    vocab_size = state.config.model.shape.vocab_size
    given, param = request.prompt, "prompt"
    if request.prompt_token_ids is not None:
        given, param = list(request.prompt_token_ids), "prompt_token_ids"
    if given is None:
        raise MissingField("prompt is required", "prompt")
    items: list[str | list[int]]
    if isinstance(given, str):
        items = [given]
    elif given and isinstance(given[0], int):
        items = [_all_of(given, int, param)]
    elif given and isinstance(given[0], str):
        items = list(_all_of(given, str, param))
    else:
        items = list(_all_of(given, list, param))
    if not 1 <= len(items) <= MAX_PROMPTS:
        raise InvalidRequest(f"{param} must hold 1 to {MAX_PROMPTS} prompts, got {len(items)}", param)
    prompts = []
    for item in items:
        if isinstance(item, str):
            ids = await encode(tokenizer, item, True, state.config.model.max_model_len)
            prompts.append(_checked(ids, item, param))
        else:
            prompts.append(_of_ids(item, vocab_size, param))
    return prompts


def _all_of(values: list[Any], kind: type[ResultT], param: str) -> list[ResultT]:
    if not all(isinstance(value, kind) for value in values):
        raise InvalidRequest(f"{param} must not mix texts, token ids and lists of token ids", param)
    return values


def _of_ids(ids: list[int], vocab_size: int, param: str) -> Prompt:
    if not ids:
        raise InvalidRequest(f"{param} must not be empty", param)
    if min(ids) < 0 or max(ids) >= vocab_size:
        check_token_ids(ids, vocab_size, param)
    return Prompt(ids, None)


def _checked(ids: list[int], text: str, param: str) -> Prompt:
    if not ids:
        raise InvalidRequest(f"{param} must not be empty", param)
    return Prompt(ids, text)


async def render_chat(
    messages: list[dict[str, Any]],
    state: ServerState,
    options: dict[str, Any] | None,
    own_template: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as the model reads it. Raises `InvalidRequest` when the template refuses it."""
    if state.chat_template is None:
        raise EngineUnavailable("the chat template is not loaded yet; retry when /health answers 200")
    options = {"add_generation_prompt": add_generation_prompt, **(options or {})}
    if "chat_template" in options:
        raise InvalidRequest("chat_template_kwargs must not hold 'chat_template'", "chat_template_kwargs")
    if own_template is None:
        return state.chat_template.render(messages, **options)
    return await asyncio.to_thread(state.chat_template.render, messages, chat_template=own_template, **options)
