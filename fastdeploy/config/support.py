"""Which flags do something: the one table to edit when a feature arrives.

Every flag that is named in neither table is honoured. The rule for the others: a flag that would change what a client
gets, where the engine runs or whom it talks to is refused; one that could only change speed or memory is accepted with
a warning. Both only speak up when the flag differs from its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

_TEXT_ONLY = "this version takes and gives text only"

# flag -> what to do instead
NOT_YET: Mapping[str, str] = MappingProxyType(
    {
        # server
        "workers": "leave it at 1; one front end process serves all connections",
        "controller_port": "leave it negative; there is no control server",
        "enable_mm_output": _TEXT_ONLY,
        # model
        "tokenizer_base_url": "give a folder with --tokenizer",
        "model_config_name": "name the file config.json",
        "task": "only generate is there; leave the flag out",
        "runner": "only text generation is there; leave the flag out",
        "convert": "only text generation is there; leave the flag out",
        "override_pooler_config": "only text generation is there; leave the flag out",
        "model_impl": "use auto or fastdeploy",
        "reasoning_parser": "leave it out; reasoning stays in the content",
        "tool_call_parser": "leave it out; tool calls stay in the content",
        "tool_parser_plugin": "leave it out; tool calls stay in the content",
        "speculative_config": "leave it out; tokens are decoded one at a time",
        "dynamic_load_weight": "restart the server to change weights",
        "load_strategy": "use normal: weights are read from the model folder",
        "rsync_config": "use --load-strategy normal: weights are read from the model folder",
        "lm_head_fp32": "use --dtype float32 to compute everything in float32",
        "guided_decoding_backend": "use off; check the output in the client",
        "guided_decoding_disable_any_whitespace": "leave it out; there is no guided decoding",
        "enable_keep_sampling_mask": "leave it out",
        "enable_entropy": "leave it out; ask for logprobs in the request",
        "enable_early_stop": "leave it out; use stop, max_tokens or repetition_penalty in the request",
        "early_stop_config": "leave it out; use stop, max_tokens or repetition_penalty in the request",
        "logits_processors": "leave it out; logits_processors_args with logit_bias works in every request",
        "routing_replay_config": "leave it out",
    }
)

# flag -> why it does nothing
NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "revision": "the model is a folder",
        "use_warmup": "there is no warm-up to switch on",
        "limit_mm_per_prompt": _TEXT_ONLY,
        "mm_processor_kwargs": _TEXT_ONLY,
        "max_encoder_cache": _TEXT_ONLY,
        "max_processor_cache": _TEXT_ONLY,
        "enable_mm": f"deprecated; {_TEXT_ONLY}",
        "disable_chunked_mm_input": _TEXT_ONLY,
        "graph_optimization_config": "there is no graph mode to configure",
        "plas_attention_config": "attention is always exact",
        "disable_custom_all_reduce": "there is one way to reduce",
        "enable_flashinfer_allreduce_fusion": "there is one way to reduce",
        "use_internode_ll_two_stage": "there is one way to exchange rows",
        "disable_sequence_parallel_moe": "the rows of sparse layers are always split over tensor parallel ranks",
        "enable_chunked_moe": "steps are bounded by --max-num-batched-tokens",
        "chunked_moe_size": "steps are bounded by --max-num-batched-tokens",
        "shutdown_comm_group_if_worker_idle": "groups are kept; an idle one costs nothing",
        "kv_cache_ratio": "prompt and output share one pool of pages",
        "swap_space": "pages are kept on the device only",
        "prealloc_dec_block_slot_num_threshold": "pages are given out when they are needed",
        "static_decode_blocks": "pages are given out when they are needed",
        "kvcache_storage_backend": "pages are kept on the device only",
        "write_policy": "pages are kept on the device only",
    }
)

# values that differ from the default and mean the same
ALSO_FINE: Mapping[str, frozenset[object]] = MappingProxyType(
    {
        "model_impl": frozenset({"fastdeploy"}),
        "guided_decoding_disable_any_whitespace": frozenset({"false", "0"}),
    }
)


@dataclass(frozen=True, slots=True)
class Support:
    """State of a flag; `note` says what to do instead ("refused") or why it does nothing ("no_effect")."""

    state: Literal["honoured", "refused", "no_effect"]
    note: str = ""


def support_of(name: str) -> Support:
    """The state of the flag whose field is `name`."""
    if name in NOT_YET:
        return Support("refused", NOT_YET[name])
    if name in NO_EFFECT:
        return Support("no_effect", NO_EFFECT[name])
    return Support("honoured")
