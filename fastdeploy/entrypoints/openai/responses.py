"""The JSON bodies that clients get back. Full answers carry nulls; chunks of a stream are written in `events.py`."""

from __future__ import annotations

from typing import Any

import msgspec


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt tokens, how many came from the prefix cache."""

    cached_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Of the generated tokens, how many were reasoning."""

    reasoning_tokens: int = 0
    image_tokens: int = 0


class UsageInfo(msgspec.Struct):
    """Token counts of one HTTP request, over all its prompts and choices."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(msgspec.Struct):
    """A token that could have been taken."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct):
    """The token taken, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of the tokens of one message or delta."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    """The answer of one choice; the last four fields are filled with `return_token_ids`."""

    content: str
    role: str = "assistant"
    multimodal_content: None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    prompt_tokens: str | None = None
    completion_tokens: str | None = None


class ChatChoice(msgspec.Struct):
    """One choice of a chat completion."""

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    draft_logprobs: None = None
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct):
    """Answer of POST /v1/chat/completions without `stream`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    object: str = "chat.completion"


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry per token; `text_offset` counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One choice of a plain completion."""

    index: int
    text: str
    finish_reason: str
    logprobs: CompletionLogprobs | None = None
    draft_logprobs: None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    prompt_tokens: str | None = None
    completion_tokens: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct):
    """Answer of POST /v1/completions without `stream`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo
    object: str = "text_completion"


class ErrorInfo(msgspec.Struct):
    """What went wrong; `param` names the request field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """Body of every answer with status 400 or above."""

    error: ErrorInfo


class ModelPermission(msgspec.Struct):
    """OpenAI's permission record; nothing is enforced by it."""

    id: str
    created: int
    object: str = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct):
    """The model served."""

    id: str
    created: int
    root: str
    max_model_len: int
    permission: list[ModelPermission]
    object: str = "model"
    owned_by: str = "FastDeploy"
    parent: None = None


class ModelList(msgspec.Struct):
    """Answer of GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"


class TokenizeAnswer(msgspec.Struct):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct):
    """Answer of POST /detokenize."""

    prompt: str


class AbortedRequest(msgspec.Struct):
    """A request that was running, and how many tokens it had generated."""

    request_id: str
    output_token_count: int


class AbortResult(msgspec.Struct):
    """What became of the requests named."""

    aborted: list[AbortedRequest]
    not_found: list[str]


class AbortAnswer(msgspec.Struct):
    """Answer of POST /v1/abort_requests."""

    request_id: str
    result: AbortResult
    status: str = "success"
    error: str | None = None


class ExpertPlaces(msgspec.Struct):
    """Where experts lie: `experts[i][g]` are those of rank g in the sparse layer number `layers[i]`.

    Nothing is known before the first step. `pause_ms`: of all checks, in which no step ran. The last two: rows of the
    busiest rank over those of the mean rank, as the last check found and left it.
    """

    redundant_experts_num: int
    layers: list[int]
    experts: list[list[list[int]]]
    n_checks: int
    n_moved: int
    pause_ms: int
    busiest_over_mean_before: float
    busiest_over_mean_after: float


class ExpertPlacesAnswer(msgspec.Struct):
    """Answer of POST /rearrange_experts and /check_redundant."""

    data: ExpertPlaces
    code: int = 0
    msg: str = "ok"


class ExpertRows(msgspec.Struct):
    """`tokens[i][e]`: rows that the ranks of this server have sent to expert e in the sparse layer `layers[i]`."""

    layers: list[int]
    tokens: list[list[int]]


class ExpertRowsAnswer(msgspec.Struct):
    """Answer of POST /get_per_expert_tokens_stats."""

    data: ExpertRows
    code: int = 0
    msg: str = "ok"
