"""`completion_token_ids` of a request: tokens that another server generated before it gave the request up."""

from __future__ import annotations

from fastdeploy.entrypoints.openai.job import Job
from fastdeploy.entrypoints.openai.sampling import check_token_ids
from fastdeploy.entrypoints.openai.schema import GenerationRequest
from fastdeploy.errors import InvalidRequest

_NAME = "completion_token_ids"


def known_output(request: GenerationRequest, job: Job, vocab_size: int) -> list[int]:
    """What the answer begins with; it counts towards max_tokens. Raises InvalidRequest."""
    ids = request.completion_token_ids or []
    if not ids:
        return []
    check_token_ids(ids, vocab_size, _NAME)
    if len(job.prompts) > 1 or job.n_choices > 1:
        raise InvalidRequest(f"{_NAME} needs one prompt and n=1: they are the beginning of one answer", _NAME)
    (params,) = job.params
    if params.logprobs is not None or params.prompt_logprobs is not None:
        raise InvalidRequest(f"{_NAME} cannot be combined with logprobs, which those tokens lack", _NAME)
    if params.max_tokens is not None and len(ids) >= params.max_tokens:
        raise InvalidRequest(
            f"{_NAME} has {len(ids)} tokens, which must be fewer than max_tokens ({params.max_tokens})", _NAME
        )
    return ids
