"""Every flag of a server, each one a field: `ServerArgs` are those of HTTP, `EngineArgs` those that `LLM` takes too.

Which of them do something is written in `config.support`; what their values mean together is checked in
`config.resolve`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from fastdeploy.config.flags import Flag, UnknownOption, convert, flags_of, read_flags, suggestion
from fastdeploy.config.schema import LogprobsMode
from fastdeploy.errors import ConfigError

Json: TypeAlias = dict[str, Any]
Ports: TypeAlias = tuple[int, ...]

HTTP = "HTTP server"
MODEL = "Model"
SAMPLING = "Sampling and logprobs"
PARALLEL = "Device and parallelism"
CACHE = "KV cache"
SCHEDULER = "Scheduling"
DISAGGREGATION = "Disaggregation and routing"
PORTS = "Internal ports (not needed: the processes of a server talk over private channels)"


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Flags of the HTTP side."""

    host: Annotated[str, Flag(HTTP, "Address to listen on; 127.0.0.1 keeps the server private to this machine.")] = (
        "0.0.0.0"
    )
    port: Annotated[int, Flag(HTTP, "HTTP port; 0 takes a free one and prints it.")] = 8000
    workers: Annotated[int, Flag(HTTP, "HTTP worker processes.")] = 1
    metrics_port: Annotated[
        int | None, Flag(HTTP, "Port of /metrics and /config-info; left out, they are served on --port.")
    ] = None
    controller_port: Annotated[int, Flag(HTTP, "Port of the control server; negative for none.")] = -1
    max_waiting_time: Annotated[
        int, Flag(HTTP, "Seconds a request may wait before it runs; then it fails with 504. -1 for no limit.")
    ] = -1
    max_concurrency: Annotated[
        int, Flag(HTTP, "Requests the server holds at once, streams included; one more is answered 429.")
    ] = 2048
    timeout_graceful_shutdown: Annotated[
        int, Flag(HTTP, "Seconds that running requests get to finish after SIGTERM; 0 waits for all of them.")
    ] = 0
    timeout: Annotated[
        int, Flag(HTTP, "Seconds of engine silence after which a request with work to do fails; 0 for no limit.")
    ] = 0
    api_key: Annotated[
        tuple[str, ...],
        Flag(HTTP, "Keys accepted as 'Authorization: Bearer KEY' under /v1; else those of FD_API_KEY.", metavar="KEY"),
    ] = ()
    restart: Annotated[
        Literal["auto", "on-failure", "never"],
        Flag(
            HTTP, "Bring an engine back that died; auto does so with several data parallel ranks, else the server ends."
        ),
    ] = "auto"
    enable_mm_output: Annotated[bool, Flag(HTTP, "Return multimodal content in answers.")] = False

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> ServerArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Flags of the model and the engine; also the keywords of `LLM`."""

    # model
    model: Annotated[
        str, Flag(MODEL, "Folder of the checkpoint: config.json, tokenizer files, *.safetensors.", metavar="DIR")
    ] = ""
    served_model_name: Annotated[
        str | None,
        Flag(MODEL, "Name that requests must give as 'model'; left out, any name is accepted.", metavar="NAME"),
    ] = None
    tokenizer: Annotated[str | None, Flag(MODEL, "Folder of the tokenizer, if not the model's.", metavar="DIR")] = None
    max_model_len: Annotated[
        int | None,
        Flag(
            MODEL,
            "Most tokens of a request, prompt and output. (default: 2048, less if the model or the cache hold less)",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag(MODEL, "Type of weights and activations; auto is float32 on a CPU and the checkpoint's type on a GPU."),
    ] = "auto"
    load_choices: Annotated[
        Literal["default", "default_v1", "dummy", "synthetic"],
        Flag(
            MODEL,
            "How weights are read: default and default_v1 stream safetensors; dummy makes up random weights; synthetic "
            "has no model at all and makes answers up, to load routers and front ends.",
        ),
    ] = "default_v1"
    synthetic_config: Annotated[
        Json | None,
        Flag(MODEL, "Pace of a synthetic server in ms: step_ms, prompt_token_ms, sequence_ms (default 10, 0.05, 0.1)."),
    ] = None
    chat_template: Annotated[
        str | None, Flag(MODEL, "Chat template, as text or as a file, instead of the model's own.", metavar="TEXT|FILE")
    ] = None
    revision: Annotated[str, Flag(MODEL, "Revision of a model fetched by name.")] = "master"
    model_config_name: Annotated[str, Flag(MODEL, "Name of the model's configuration file.")] = "config.json"
    tokenizer_base_url: Annotated[str | None, Flag(MODEL, "Address of a remote tokenizer.")] = None
    task: Annotated[str, Flag(MODEL, "What the model is used for.")] = "generate"
    runner: Annotated[str, Flag(MODEL, "Kind of model runner.")] = "auto"
    convert: Annotated[str, Flag(MODEL, "Adapter that turns the model into a pooling model.")] = "auto"
    model_impl: Annotated[Literal["auto", "fastdeploy", "paddleformers"], Flag(MODEL, "Whose model code is used.")] = (
        "auto"
    )
    override_pooler_config: Annotated[Json | None, Flag(MODEL, "Settings of the pooler.")] = None
    use_warmup: Annotated[int, Flag(MODEL, "Run a warm-up before the server is ready.")] = 0
    limit_mm_per_prompt: Annotated[Json | None, Flag(MODEL, "Most images and videos of one prompt.")] = None
    mm_processor_kwargs: Annotated[Json | None, Flag(MODEL, "Settings of the image processor.")] = None
    max_encoder_cache: Annotated[int, Flag(MODEL, "Tokens of the encoder cache; 0 disables it.")] = -1
    max_processor_cache: Annotated[float, Flag(MODEL, "GiB of the image processor's cache; 0 disables it.")] = -1.0
    enable_mm: Annotated[bool, Flag(MODEL, "Deprecated: multimodal input.")] = False
    dynamic_load_weight: Annotated[bool, Flag(MODEL, "Offer the endpoints that clear and reload weights.")] = False
    load_strategy: Annotated[
        Literal["normal", "ipc", "ipc_snapshot", "rsync"], Flag(MODEL, "Where weights come from.")
    ] = "normal"
    rsync_config: Annotated[Json | None, Flag(MODEL, "Settings of weight transfer.")] = None
    quantization: Annotated[
        str | Json | None,
        Flag(
            MODEL,
            "Quantize linear layers and experts while loading: block_wise_fp8 (8-bit floats, a Hopper GPU), wint8 or "
            "wint4 (8- or 4-bit whole numbers, activations stay as they are).",
        ),
    ] = None
    graph_optimization_config: Annotated[Json | None, Flag(MODEL, "Settings of CUDA graphs and compilation.")] = None
    plas_attention_config: Annotated[Json | None, Flag(MODEL, "Settings of sparse attention.")] = None
    speculative_config: Annotated[Json | None, Flag(MODEL, "Method and size of speculative decoding.")] = None
    lm_head_fp32: Annotated[bool, Flag(MODEL, "Compute the output layer in float32.")] = False

    # sampling and what is made of the output
    enable_logprob: Annotated[
        bool, Flag(SAMPLING, "Accepted for compatibility: requests may always ask for log-probabilities.")
    ] = False
    max_logprobs: Annotated[
        int, Flag(SAMPLING, "Most alternatives per position that a request may ask for; -1 for the whole vocabulary.")
    ] = 20
    logprobs_mode: Annotated[
        LogprobsMode, Flag(SAMPLING, "raw_* is before, processed_* after temperature, penalties, top-k and top-p.")
    ] = "raw_logprobs"
    seed: Annotated[int, Flag(SAMPLING, "Seed of random weights and of the engine.")] = 0
    reasoning_parser: Annotated[
        str | None, Flag(SAMPLING, "Split reasoning from the content, by the model's format.")
    ] = None
    tool_call_parser: Annotated[str | None, Flag(SAMPLING, "Turn tool calls into JSON, by the model's format.")] = None
    tool_parser_plugin: Annotated[str | None, Flag(SAMPLING, "File with further tool call parsers.")] = None
    guided_decoding_backend: Annotated[str, Flag(SAMPLING, "Library that enforces guided_* and response_format.")] = (
        "off"
    )
    guided_decoding_disable_any_whitespace: Annotated[
        str, Flag(SAMPLING, "Allow no free whitespace in guided JSON.")
    ] = "False"
    enable_keep_sampling_mask: Annotated[bool, Flag(SAMPLING, "Return which tokens top-k and top-p left.")] = False
    enable_entropy: Annotated[bool, Flag(SAMPLING, "Return the entropy of each position.")] = False
    enable_early_stop: Annotated[bool, Flag(SAMPLING, "End requests that repeat themselves.")] = False
    early_stop_config: Annotated[Json | None, Flag(SAMPLING, "When a request counts as repeating itself.")] = None
    logits_processors: Annotated[tuple[str, ...], Flag(SAMPLING, "Class names of logits processors.")] = ()
    routing_replay_config: Annotated[Json | None, Flag(SAMPLING, "Record which experts tokens went to.")] = None

    # device and parallelism
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Flag(PARALLEL, "Where the model runs; auto takes a GPU when there is one.")
    ] = "auto"
    threads: Annotated[
        int | None, Flag(PARALLEL, "CPU threads of the model; left out, OMP_NUM_THREADS or all cores.")
    ] = None
    enable_expert_parallel: Annotated[
        bool, Flag(PARALLEL, "Spread the experts over all ranks; with one rank it changes nothing.")
    ] = False
    tensor_parallel_size: Annotated[int, Flag(PARALLEL, "Devices that share each layer.", short="-tp")] = 1
    data_parallel_size: Annotated[
        int, Flag(PARALLEL, "Replicas of the attention layers, each with its own requests.")
    ] = 1
    local_data_parallel_id: Annotated[
        int, Flag(PARALLEL, "Data parallel rank to serve, instead of all; multi_api_server sets it.")
    ] = 0
    ips: Annotated[
        tuple[str, ...], Flag(PARALLEL, "Addresses of all machines, each with an equal share of the replicas.")
    ] = ()
    disable_custom_all_reduce: Annotated[bool, Flag(PARALLEL, "Use the library's all-reduce only.")] = False
    enable_flashinfer_allreduce_fusion: Annotated[bool, Flag(PARALLEL, "Fuse all-reduce and norm.")] = False
    use_internode_ll_two_stage: Annotated[bool, Flag(PARALLEL, "Two-stage low-latency dispatch between hosts.")] = False
    disable_sequence_parallel_moe: Annotated[
        bool, Flag(PARALLEL, "Do not split tokens over tensor parallel ranks in MoE layers.")
    ] = False
    enable_chunked_moe: Annotated[bool, Flag(PARALLEL, "Compute MoE layers in pieces of tokens.")] = False
    chunked_moe_size: Annotated[int, Flag(PARALLEL, "Tokens of such a piece.")] = 256
    enable_eplb: Annotated[
        bool, Flag(PARALLEL, "Keep experts even over the ranks while they serve: copies of hot ones, moves.")
    ] = False
    eplb_config: Annotated[
        Json | None,
        Flag(
            PARALLEL,
            "Settings of --enable-eplb: redundant_experts_num (0), rearrange_interval_s (60; 0: only when asked by "
            "POST /rearrange_experts), min_gain (0.05, of the mean rank's rows).",
        ),
    ] = None
    shutdown_comm_group_if_worker_idle: Annotated[
        bool | None, Flag(PARALLEL, "Tear communication groups down when idle.")
    ] = None

    # KV cache
    block_size: Annotated[int, Flag(CACHE, "Tokens of one cache page.")] = 64
    num_gpu_blocks_override: Annotated[
        int | None, Flag(CACHE, "Pages of the cache, on any device; left out, as many as free memory holds.")
    ] = None
    gpu_memory_utilization: Annotated[
        float, Flag(CACHE, "Share of the device's memory that weights, cache and scratch space may take, up to 1.")
    ] = 0.9
    enable_prefix_caching: Annotated[bool, Flag(CACHE, "Reuse the pages of prompts that begin alike.")] = True
    enable_output_caching: Annotated[
        bool, Flag(CACHE, "Keep pages of generated tokens for reuse too, as the next turn of a chat needs them.")
    ] = True
    kv_cache_ratio: Annotated[float, Flag(CACHE, "Share of pages for prompts.")] = 0.75
    swap_space: Annotated[float | None, Flag(CACHE, "GB of host memory for pages.")] = None
    prealloc_dec_block_slot_num_threshold: Annotated[
        int, Flag(CACHE, "Free slots of a page below which the next is taken.")
    ] = 12
    static_decode_blocks: Annotated[int, Flag(CACHE, "Pages given to a request for its output at once.")] = 2
    kvcache_storage_backend: Annotated[
        Literal["mooncake", "attention_store", "file"] | None, Flag(CACHE, "Storage below the device's pages.")
    ] = None
    write_policy: Annotated[str, Flag(CACHE, "When pages are written to storage.")] = "write_through"

    # scheduling
    max_num_seqs: Annotated[int, Flag(SCHEDULER, "Most requests that run at once, 1 to 256.")] = 8
    max_num_batched_tokens: Annotated[
        int | None,
        Flag(
            SCHEDULER,
            "Most tokens of one step: more speeds up long prompts, fewer keeps running streams even. "
            "(default: 8192 on a GPU, 2048 on a CPU, at most --max-model-len x --max-num-seqs)",
        ),
    ] = None
    enable_chunked_prefill: Annotated[
        bool | None,
        Flag(
            SCHEDULER,
            "Compute long prompts in pieces between other steps. (default: on, off if FD_DISABLE_CHUNKED_PREFILL=1)",
        ),
    ] = None
    max_num_partial_prefills: Annotated[int, Flag(SCHEDULER, "Prompts that may be in pieces at the same time.")] = 1
    max_long_partial_prefills: Annotated[int, Flag(SCHEDULER, "How many of those may be long ones.")] = 1
    long_prefill_token_threshold: Annotated[
        int, Flag(SCHEDULER, "Prompt tokens from which a prompt is long; 0 is 4% of --max-model-len.")
    ] = 0
    scheduler_max_size: Annotated[
        int, Flag(SCHEDULER, "Requests that may wait; one more is refused. -1 for no limit.")
    ] = -1
    scheduler_ttl: Annotated[
        int, Flag(SCHEDULER, "Seconds a request may wait when --scheduler-max-size is reached.")
    ] = 900
    enable_overlap_schedule: Annotated[
        bool, Flag(SCHEDULER, "Accepted for compatibility: a step is always planned while the one before it runs.")
    ] = False
    disable_chunked_mm_input: Annotated[bool, Flag(SCHEDULER, "Never split an image over two steps.")] = False
    scheduler_name: Annotated[
        Literal["local", "global", "splitwise", "dp"],
        Flag(SCHEDULER, "Waiting room of requests: in this server or shared through Redis."),
    ] = "local"
    scheduler_host: Annotated[str, Flag(SCHEDULER, "Redis host.")] = "127.0.0.1"
    scheduler_port: Annotated[int, Flag(SCHEDULER, "Redis port.")] = 6379
    scheduler_db: Annotated[int, Flag(SCHEDULER, "Redis database.")] = 0
    scheduler_password: Annotated[str | None, Flag(SCHEDULER, "Redis password.")] = None
    scheduler_topic: Annotated[
        str, Flag(SCHEDULER, "Prefix of the Redis keys; servers with the same topic share requests.")
    ] = "default"
    scheduler_min_load_score: Annotated[float, Flag(SCHEDULER, "Queue length from which others may take requests.")] = (
        3.0
    )
    scheduler_load_shards_num: Annotated[int, Flag(SCHEDULER, "Load tables in Redis.")] = 1
    scheduler_sync_period: Annotated[int, Flag(SCHEDULER, "Milliseconds between load reports.")] = 5
    scheduler_expire_period: Annotated[int, Flag(SCHEDULER, "Milliseconds until a silent server counts as dead.")] = (
        3000
    )
    scheduler_release_load_expire_period: Annotated[
        int, Flag(SCHEDULER, "Seconds until the load of an unanswered request is dropped.")
    ] = 600
    scheduler_reader_parallel: Annotated[int, Flag(SCHEDULER, "Redis readers.")] = 4
    scheduler_writer_parallel: Annotated[int, Flag(SCHEDULER, "Redis writers.")] = 4
    scheduler_reader_batch_size: Annotated[int, Flag(SCHEDULER, "Results per read.")] = 200
    scheduler_writer_batch_size: Annotated[int, Flag(SCHEDULER, "Results per write.")] = 200

    # disaggregation and routing
    splitwise_role: Annotated[
        Literal["mixed", "prefill", "decode"],
        Flag(DISAGGREGATION, "Part of this server in prefill/decode disaggregation."),
    ] = "mixed"
    cache_transfer_protocol: Annotated[str, Flag(DISAGGREGATION, "How pages travel between servers.")] = "ipc,rdma"
    router: Annotated[str | None, Flag(DISAGGREGATION, "host:port of the router to register with.")] = None
    innode_prefill_ports: Annotated[Ports, Flag(DISAGGREGATION, "Queue ports of prefill servers on this host.")] = ()

    # ports
    engine_worker_queue_port: Annotated[Ports, Flag(PORTS, "Accepted; one per data parallel rank.")] = ()
    cache_queue_port: Annotated[Ports, Flag(PORTS, "Accepted; one per data parallel rank.")] = ()
    pd_comm_port: Annotated[
        Ports,
        Flag(PORTS, "Where the engine cores of other servers ask for pages; one per data parallel rank, or the first."),
    ] = ()
    rdma_comm_ports: Annotated[
        Ports, Flag(PORTS, "Where ranks of other servers read pages over the network; one per device, or the first.")
    ] = ()

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> EngineArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """From the keywords of `LLM`: the flags with `_` for `-`; lists may be lists or comma strings.

        Raises UnknownOption (a TypeError too) for a keyword that does not exist, naming the closest one that does, and
        ConfigError for values of the wrong type, all of them together.
        """
        flags = {flag.name: flag for flag in flags_of(cls)}
        server_only = {flag.name for flag in flags_of(ServerArgs)}
        unknown = []
        for name in kwargs.keys() - flags.keys():
            why = "only a server takes it" if name in server_only else f"no such argument{suggestion(name, flags)}"
            unknown.append(f"{name}: {why}")
        if unknown:
            raise UnknownOption("\n".join(sorted(unknown)))
        values, wrong = {}, []
        for name, value in kwargs.items():
            try:
                values[name] = convert(flags[name], value)
            except ConfigError as exc:
                wrong.append(str(exc).replace(flags[name].option, name, 1))
        if wrong:
            raise ConfigError("\n".join(wrong))
        return cls(**values)
