"""What the scheduler refuses: limits under which requests would stall for ever, and requests that can never run."""

from __future__ import annotations

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import ConfigError, ContextTooLong, InvalidRequest
from fastdeploy.wire.messages import Submit


def check_limits(config: EngineConfig) -> int:
    """The page count. Raises ConfigError when it is unknown or the limits of a step would stall a request for ever."""
    limits, cache = config.scheduler, config.cache
    if cache.n_pages is None:
        raise ConfigError("cache.n_pages is not known yet: the scheduler starts after the ranks measured their memory")
    if limits.max_batched_tokens < limits.max_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({limits.max_batched_tokens}) must be at least --max-num-seqs "
            f"({limits.max_seqs})"
        )
    if not limits.chunked_prefill and limits.max_batched_tokens < config.model.max_model_len:
        raise ConfigError(
            f"--max-num-batched-tokens ({limits.max_batched_tokens}) must be at least --max-model-len "
            f"({config.model.max_model_len}) unless --enable-chunked-prefill is given"
        )
    return cache.n_pages


def check_prompt(submit: Submit, config: EngineConfig, n_pages: int) -> None:
    """Raises InvalidRequest or ContextTooLong when the prompt can never be computed."""
    ids = submit.prompt_ids + submit.output_ids  # what was generated before counts like prompt
    n_prompt, n_room = len(ids), n_pages * config.cache.page_tokens
    max_model_len, vocab_size = config.model.max_model_len, config.model.shape.vocab_size
    if not submit.prompt_ids:
        raise InvalidRequest("prompt must have at least one token", "prompt")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InvalidRequest(f"prompt: token ids must be in [0, {vocab_size - 1}]", "prompt")
    if n_prompt >= max_model_len:
        raise ContextTooLong(
            f"prompt has {n_prompt} tokens and must leave room for one more in max_model_len ({max_model_len}): "
            "shorten it",
            "prompt",
        )
    if n_prompt + 1 > n_room:
        raise InvalidRequest(
            f"prompt has {n_prompt} tokens, and with one more it never fits the KV cache of {n_room} tokens "
            f"({n_pages} pages of {config.cache.page_tokens}): shorten it, or raise num_gpu_blocks_override or "
            "gpu_memory_utilization",
            "prompt",
        )
