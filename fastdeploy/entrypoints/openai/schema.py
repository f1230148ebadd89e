"""The JSON bodies that clients send, as structs: field names, types, ranges, defaults.

`/openapi.json` is generated from these structs, and decoding checks them, so the two cannot disagree. `None` means
"not said"; a client may also send null for it. What a field does is in `sampling.py`, `prompts.py`, `chat.py` and
`completions.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from fastdeploy.frontend.params import MAX_BAD_WORDS, MAX_STOP_CHARS, MAX_STOP_STRINGS
from fastdeploy.sampling_params import MAX_SEED

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_STOP_TOKENS = 256
MAX_BIASED_TOKENS = 1024
MAX_TEMPLATE_CHARS = 65536

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
RequestId = Annotated[
    str,
    Meta(
        pattern=r"^[\x21-\x7e]{1,256}$",
        description="Names the request: 1 to 256 printable ASCII characters, no spaces.",
    ),
]
Bias = Annotated[
    dict[str, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=MAX_BIASED_TOKENS, description="Token id -> number added to its logit."),
]


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class DisaggregateInfo(msgspec.Struct, kw_only=True):
    """Which two servers compute the request; written by a router. What decides is who prefills and where it listens."""

    prefill_ip: Annotated[str, Meta(min_length=1, max_length=255)]
    prefill_connector_port: Port | str
    decode_ip: str | None = None
    decode_connector_port: int | str | None = None
    decode_device_ids: list[int | str] | None = None
    decode_rdma_ports: list[int | str] | None = None
    transfer_protocol: str | list[str] | None = None
    decode_tp_size: int | str | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """Fields that chat and plain completions share."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structural_tag",
        "mm_hashes",
        "include_draft_logprobs",
        "reasoning_max_tokens",
    )

    model: str | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    n: Choices | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] | None = None
    bad_words_token_ids: Annotated[list[Count], Meta(max_length=MAX_BIASED_TOKENS)] | None = None
    logit_bias: Bias | None = None
    logits_processors_args: dict[str, Any] | None = None
    temp_scaled_logprobs: bool | None = None
    top_p_normalized_logprobs: bool | None = None
    dp_rank: (
        Annotated[int, Meta(ge=0, description="Data-parallel rank to run on, with --scheduler-name dp.")] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_streaming_response_tokens: (
        Annotated[int, Meta(ge=1, description="Tokens of one choice gathered in one chunk; 1 is one chunk a step.")]
        | None
    ) = None
    return_token_ids: bool | None = None
    request_id: RequestId | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structural_tag: Any = None
    disaggregate_info: DisaggregateInfo | None = None
    mm_hashes: Any = None
    include_draft_logprobs: bool | None = None
    reasoning_max_tokens: int | None = None
    completion_token_ids: list[Count] | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        *GenerationRequest.UNSUPPORTED,
        "functions",
        "function_call",
        "audio",
        "mm_processor_kwargs",
    )

    messages: Annotated[
        list[dict[str, Any] | int], Meta(description="A conversation, or the token ids of a rendered one.")
    ]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    prompt_token_ids: Annotated[list[Count], Meta(description="Used as they are, in place of messages.")] | None = None
    disable_chat_template: bool | None = None
    chat_template: Annotated[str, Meta(max_length=MAX_TEMPLATE_CHARS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    metadata: Annotated[dict[str, Any], Meta(description="Merged into the request, with lower priority.")] | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    mm_processor_kwargs: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: (
        Annotated[
            str | list[str | Count | list[Count]],
            Meta(description="One text, one list of token ids, or a list of texts or of lists of token ids."),
        ]
        | None
    ) = None
    prompt_token_ids: list[Count | list[Count]] | None = None
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    suffix: (
        Annotated[str | dict[str, Any], Meta(description="An object is merged into the request, with lower priority.")]
        | None
    ) = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[Count]
    model: str | None = None


class AbortRequest(msgspec.Struct, kw_only=True):
    """POST /v1/abort_requests: everything, or the requests named."""

    abort_all: bool | None = None
    req_ids: list[str] | None = None
