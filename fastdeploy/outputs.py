"""What `LLM` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastdeploy.wire.messages import FinishReason, RequestTimes, TokenLogprobs


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `logprobs` has one entry per token of `token_ids`; `send_idx` counts the partial results so far."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    send_idx: int = 0
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def top_logprobs(self) -> list[dict[int, float]] | None:
        """Per token the most likely tokens asked for, {id: log-probability}."""
        if self.logprobs is None:
            return None
        return [dict(zip(entry.top_ids, entry.top_logprobs, strict=True)) for entry in self.logprobs]


@dataclass(slots=True)
class RequestMetrics:
    """When a request passed each stage: unix seconds, durations in seconds; None where it did not."""

    arrival_time: float | None = None
    inference_start_time: float | None = None
    engine_recv_first_token_time: float | None = None
    engine_recv_latest_token_time: float | None = None
    time_in_queue: float | None = None
    first_token_time: float | None = None
    model_forward_time: float | None = None
    model_execute_time: float | None = None

    @staticmethod
    def of(times: RequestTimes | None) -> RequestMetrics:
        """From what the engine noted."""
        if times is None or not times.first_scheduled_s:
            return RequestMetrics(arrival_time=times.received_s if times else None)
        first, last = times.first_token_s or None, times.last_token_s or None
        return RequestMetrics(
            arrival_time=times.received_s,
            inference_start_time=times.first_scheduled_s,
            engine_recv_first_token_time=first,
            engine_recv_latest_token_time=last,
            time_in_queue=times.first_scheduled_s - times.received_s,
            first_token_time=first and first - times.first_scheduled_s,
            model_forward_time=last and last - times.first_scheduled_s,
            model_execute_time=last and last - times.received_s,
        )


@dataclass(slots=True)
class RequestOutput:
    """A request and what has been generated for it.

    `outputs` is the first answer (scripts of the original read it so); `all_outputs` has all n.
    """

    request_id: str
    prompt: Any
    prompt_token_ids: list[int]
    all_outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0
    error_code: int = 200
    error_msg: str | None = None

    @property
    def outputs(self) -> CompletionOutput:
        """The first answer."""
        return self.all_outputs[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with `outputs` beside `all_outputs`."""
        return {**asdict(self), "outputs": asdict(self.outputs)}
