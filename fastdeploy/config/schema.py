"""The frozen configuration of one engine.

Built once by `config.resolve`; what is learnt later (the number of pages) makes a new value. Every class here is
plain data that msgspec can carry to another process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

DeviceName = Literal["cpu", "cuda"]
DTypeName = Literal["float32", "bfloat16", "float16"]
LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
RopeStyle = Literal["half_split", "interleaved"]
Quantization = Literal["block_wise_fp8", "wint8", "wint4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeShape:
    """Rotary embedding: `style` says which dimensions form a pair, `scaling` is the checkpoint's own table or None."""

    theta: float
    style: RopeStyle
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """Sizes of the sparse layers; `layers` lists the indices of the layers that are sparse."""

    n_experts: int
    n_experts_per_token: int
    expert_width: int
    shared_width: int  # width of the one fused shared FFN, 0 when there is none
    layers: tuple[int, ...]
    has_correction_bias: bool
    renormalise: bool
    norm_min: float  # lower bound of the divisor when renormalising
    gate_in_float32: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's sizes, read from config.json and checked; see `config.model_shape`."""

    architecture: str
    family: Literal["ernie4_5", "ernie4_5_moe", "llama", "qwen3", "qwen3_moe", "synthetic"]
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeShape
    moe: MoEShape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticConfig:
    """What a step of `--load-choices synthetic` takes, in milliseconds; the parts add up."""

    step_ms: float = 10.0  # every step
    prompt_token_ms: float = 0.05  # each prompt token that is not in the prefix cache
    sequence_ms: float = 0.1  # each sequence that gets its next token


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is computed."""

    path: str
    served_name: str
    shape: ModelShape
    dtype: DTypeName
    device: DeviceName
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, Any]  # from generation_config.json
    tokenizer_path: str | None = None  # None: the model's folder
    random_weights: bool = False  # `--load-choices dummy`
    seed: int = 0
    quantization: Quantization | None = None  # of experts and linear layers, made when they are loaded
    synthetic: SyntheticConfig | None = None  # there is no model: answers are made up at this pace


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV cache: `n_pages` pages of `page_tokens` tokens."""

    page_tokens: int = 64
    n_pages: int | None = None  # None until a rank has measured free memory
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    output_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step and of what may wait."""

    max_seqs: int = 8
    max_batched_tokens: int = 8192
    chunked_prefill: bool = True
    max_partial_prefills: int = 1
    max_long_partial_prefills: int = 1
    long_prefill_tokens: int = 0
    max_waiting: int = -1  # requests; -1 is unlimited
    waiting_ttl_s: float = 900.0
    steps_in_flight: int = 2  # planned and not committed; 2 keeps the ranks busy while a step is committed and planned


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Group sizes, and where this replica stands in them.

    Ranks are numbered over all machines, those of a replica side by side: rank = data_rank * tensor + tensor_rank. With
    `expert` all of them form one process group, without it those of a replica do.
    """

    tensor: int = 1
    data: int = 1
    expert: bool = False  # the experts of sparse layers are spread over all tensor * data ranks
    data_rank: int = 0
    serves: tuple[int, ...] = (0,)  # data ranks behind the front end that this belongs to
    hosts: tuple[str, ...] = ("127.0.0.1",)  # addresses of the machines, each with an equal run of replicas

    @property
    def n_ranks(self) -> int:
        """Ranks over all machines."""
        return self.tensor * self.data

    @property
    def n_local_replicas(self) -> int:
        """Replicas on each machine."""
        return self.data // len(self.hosts)

    @property
    def host(self) -> str:
        """The address of this replica's machine."""
        return self.hosts[self.data_rank // self.n_local_replicas]

    @property
    def shares_experts(self) -> bool:
        """Whether replicas have to agree on each step, because their sparse layers are one."""
        return self.expert and self.data > 1

    @property
    def group_size(self) -> int:
        """Ranks of the process group that this replica's ranks belong to."""
        return self.n_ranks if self.expert else self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbConfig:
    """How experts are kept even over the ranks of an expert-parallel group while it serves."""

    redundant: int = 0  # slots beside one for each expert, at least; all ranks have as many
    interval_s: float = 60.0  # between two looks at what experts got; 0: only when asked
    min_gain: float = 0.05  # of the mean rank's rows: a layer whose busiest rank would get less relief is left alone


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """Whether prompts are computed for other servers, or by others for this one, and how pages travel."""

    role: Literal["mixed", "prefill", "decode"] = "mixed"
    protocols: tuple[str, ...] = ("ipc", "rdma")
    host: str = "127.0.0.1"  # where cores and ranks listen for those of other servers
    control_ports: tuple[int, ...] = ()  # of the local replicas, in order; none: any free port each
    rank_ports: tuple[int, ...] = ()  # of the local ranks, for transports that listen; none: any free port each
    wait_limit_s: float = 30.0  # how long a prefill server keeps a request that no decode server asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobsConfig:
    """What log-probabilities may be asked for, and from which logits they come."""

    max_logprobs: int = 20  # -1 is the vocabulary size
    mode: LogprobsMode = "raw_logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine core and its ranks need to know."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    logprobs: LogprobsConfig
    log_dir: str
    transfer: TransferConfig = TransferConfig()
    eplb: EplbConfig | None = None  # None: experts stay on the ranks they start on
    n_threads: int | None = None  # threads of one CPU rank; None leaves the choice to torch
    stall_limit_s: float = 10.0  # ranks with work and without progress for longer are unhealthy


def with_measured_pages(config: EngineConfig, n_pages: int) -> EngineConfig:
    """The same configuration once a rank has found room for `n_pages` pages."""
    return replace(config, cache=replace(config.cache, n_pages=n_pages))
