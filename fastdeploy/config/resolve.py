"""Flags + checkpoint config + hardware + environment -> the frozen EngineConfig; every cross check is here.

All that is wrong is reported together, one line for each contradiction, naming the flag, its value and the limit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastdeploy.config import model_shape, synthetic
from fastdeploy.config.args import EngineArgs, ServerArgs
from fastdeploy.config.eplb import resolve_eplb
from fastdeploy.config.flags import FlagField, flags_of
from fastdeploy.config.hardware import CudaDevice, cuda_devices
from fastdeploy.config.model_folder import model_folder
from fastdeploy.config.parallel import contradictions, missing_devices, n_threads_per_rank, resolve_parallel
from fastdeploy.config.quantization import resolve_quantization
from fastdeploy.config.schema import (
    CacheConfig,
    DeviceName,
    DTypeName,
    EngineConfig,
    LogprobsConfig,
    ModelConfig,
    ModelShape,
    ParallelConfig,
    SchedulerConfig,
)
from fastdeploy.config.support import ALSO_FINE
from fastdeploy.config.transfer import resolve_transfer
from fastdeploy.errors import ConfigError, FastDeployError

DEFAULT_MODEL_LEN = 2048
MIN_MODEL_LEN = 16
MAX_NUM_SEQS = 256
MAX_PAGE_TOKENS = 4096
DEFAULT_BATCHED_TOKENS: Mapping[DeviceName, int] = {"cpu": 2048, "cuda": 8192}
LONG_PREFILL_SHARE = 0.04
DEFAULT_STALL_LIMIT_S = 10.0  # ranks report progress layer by layer, so that a long prefill is none
# On a CPU a step takes far longer than planning it, and every step planned ahead delays a new request by one.
STEPS_IN_FLIGHT: Mapping[DeviceName, int] = {"cpu": 1, "cuda": 2}

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Problems:
    """What is wrong so far."""

    lines: list[str] = field(default_factory=list)

    def check(self, holds: bool, line: str) -> bool:
        """Note `line` unless `holds`; gives `holds` back."""
        if not holds:
            self.lines.append(line)
        return holds

    def raise_if_any(self) -> None:
        """Raises ConfigError with all lines."""
        if self.lines:
            raise ConfigError("\n".join(self.lines))


def resolve(
    args: EngineArgs, environ: Mapping[str, str] = os.environ, devices: Sequence[CudaDevice] | None = None
) -> EngineConfig:
    """The configuration that `args` describe on this machine; reads config.json and generation_config.json.

    `devices`: the GPUs to plan for, if not this machine's. Logs one warning for each flag that has no effect. Raises
    ConfigError with one line for each contradiction.
    """
    problems = Problems()
    devices = cuda_devices() if devices is None else devices
    _check_support(args, problems)
    transfer = resolve_transfer(args, environ, problems.lines)
    synthetic.check_flags(args, problems.lines)
    device = _device(args, devices, problems)
    page_tokens_ok = problems.check(
        1 <= args.block_size <= MAX_PAGE_TOKENS, f"--block-size {args.block_size}: must be in 1..{MAX_PAGE_TOKENS}"
    )
    cache = _cache(args, problems)
    model = _model(args, cache if page_tokens_ok else None, device, problems)
    scheduler = _scheduler(args, model.max_model_len if model else None, device, environ, problems)
    logprobs = _logprobs(args, model, problems)
    n_threads = _n_threads(args, environ, problems)
    parallel = _parallel(args, model.shape if model else None, device, len(devices), environ, problems)
    eplb = resolve_eplb(args, parallel, model.shape if model else None, problems.lines)
    problems.raise_if_any()
    assert model is not None  # without one there was a problem to raise
    return EngineConfig(
        model=model,
        cache=cache,
        scheduler=scheduler,
        parallel=parallel,
        logprobs=logprobs,
        log_dir=log_dir(environ),
        transfer=transfer,
        eplb=eplb,
        n_threads=n_threads or (n_threads_per_rank(parallel) if device == "cpu" else None),
        stall_limit_s=_stall_limit_s(environ, problems),
    )


def resolve_server(args: ServerArgs, environ: Mapping[str, str] = os.environ) -> ServerArgs:
    """`args` checked, with the API keys of FD_API_KEY when none was given; raises ConfigError as `resolve` does."""
    problems = Problems()
    args = replace(args, controller_port=max(args.controller_port, -1), max_waiting_time=max(args.max_waiting_time, -1))
    _check_support(args, problems)
    for option, port in (("--port", args.port), ("--metrics-port", args.metrics_port)):
        problems.check(port is None or 0 <= port <= 65535, f"{option} {port}: must be in 0..65535")
    for name, least in (("max_concurrency", 1), ("timeout_graceful_shutdown", 0), ("timeout", 0)):
        value = getattr(args, name)
        problems.check(value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    problems.check(args.max_waiting_time != 0, "--max-waiting-time 0: must be at least 1, or -1 for no limit")
    problems.raise_if_any()
    from_environment = tuple(key.strip() for key in environ.get("FD_API_KEY", "").split(",") if key.strip())
    return replace(args, api_key=args.api_key or from_environment)


def resolve_all(
    server: ServerArgs, engine: EngineArgs, environ: Mapping[str, str] = os.environ
) -> tuple[ServerArgs, EngineConfig]:
    """Both of the above; what is wrong with either is reported together."""
    problems = Problems()
    config = None
    try:
        config = resolve(engine, environ)
    except ConfigError as exc:
        problems.lines.append(str(exc))
    try:
        server = resolve_server(server, environ)
    except ConfigError as exc:
        problems.lines.append(str(exc))
    problems.raise_if_any()
    assert config is not None  # otherwise `resolve` raised
    return server, config


def log_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Where log files go: FD_LOG_DIR, else `log`; absolute."""
    return str(Path(environ.get("FD_LOG_DIR") or "log").expanduser().absolute())


# ---- flags by themselves -----------------------------------------------------------------------------------------


def _check_support(args: EngineArgs | ServerArgs, problems: Problems) -> None:
    for flag in flags_of(type(args)):
        value, support = getattr(args, flag.name), flag.support
        same = value.lower() if isinstance(value, str) else value
        fine = ALSO_FINE.get(flag.name, frozenset())
        if support.state == "honoured" or value == flag.default or (fine and same in fine):
            continue
        if support.state == "refused":
            problems.lines.append(f"{_shown(flag, value)}: not supported yet: {support.note}")
        else:
            _logger.warning("%s has no effect: %s", flag.option, support.note)


def _shown(flag: FlagField, value: object) -> str:
    """Flag and value as written; no objects, which are long, and no password."""
    plain = isinstance(value, (int, float, str)) and not isinstance(value, bool) and "password" not in flag.name
    return f"{flag.option} {value}" if plain else flag.option


def _n_threads(args: EngineArgs, environ: Mapping[str, str], problems: Problems) -> int | None:
    if args.threads is not None:
        problems.check(args.threads >= 1, f"--threads {args.threads}: must be at least 1")
        return args.threads
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" is one number per nesting level
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _parallel(
    args: EngineArgs,
    shape: ModelShape | None,
    device: DeviceName,
    n_gpus: int,
    environ: Mapping[str, str],
    problems: Problems,
) -> ParallelConfig:
    try:
        parallel = resolve_parallel(args, environ)
    except ConfigError as exc:
        problems.lines.append(str(exc))
        return ParallelConfig()
    if shape is not None:
        problems.lines += contradictions(parallel, shape)
    problems.lines += missing_devices(parallel, n_gpus) if device == "cuda" else []
    return parallel


def _stall_limit_s(environ: Mapping[str, str], problems: Problems) -> float:
    text = environ.get("FD_WORKER_ALIVE_TIMEOUT") or str(DEFAULT_STALL_LIMIT_S)
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    problems.check(limit_s > 0, f"FD_WORKER_ALIVE_TIMEOUT {text}: must be a number of seconds above 0")
    return limit_s


def _device(args: EngineArgs, devices: Sequence[CudaDevice], problems: Problems) -> DeviceName:
    if args.device == "cpu" or args.load_choices == "synthetic":
        return "cpu"
    has_cuda = bool(devices)
    problems.check(
        has_cuda or args.device == "auto",
        "--device cuda: the CUDA driver sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu",
    )
    return "cuda" if has_cuda else "cpu"


# ---- the model ---------------------------------------------------------------------------------------------------


def _model(args: EngineArgs, cache: CacheConfig | None, device: DeviceName, problems: Problems) -> ModelConfig | None:
    if args.tokenizer is not None:
        problems.check(
            Path(args.tokenizer).expanduser().is_dir(),
            f"--tokenizer {args.tokenizer}: no such folder; give one with the tokenizer's files",
        )
    problems.check(args.seed >= 0, f"--seed {args.seed}: must be at least 0")
    if args.load_choices == "synthetic":
        return synthetic.synthetic_model(
            args, lambda shape: _max_model_len(args, shape, cache, problems), problems.lines
        )
    try:
        folder = model_folder(args.model)
        shape = model_shape.read_model_shape(folder)
        sampling_defaults = model_shape.read_generation_defaults(folder)
        eos_token_ids = model_shape.read_eos_token_ids(folder)
        dtype = _dtype(args, device, folder)
    except (FastDeployError, OSError) as exc:
        problems.lines.append(str(exc))
        _max_model_len(args, None, cache, problems)
        return None
    return ModelConfig(
        path=str(folder),
        served_name=args.served_model_name or args.model,
        shape=shape,
        dtype=dtype,
        device=device,
        max_model_len=_max_model_len(args, shape, cache, problems),
        eos_token_ids=eos_token_ids,
        sampling_defaults=sampling_defaults,
        tokenizer_path=None if args.tokenizer is None else str(Path(args.tokenizer).expanduser().absolute()),
        random_weights=args.load_choices == "dummy",
        seed=args.seed,
        quantization=resolve_quantization(args.quantization, device, shape, problems.lines),
    )


def _dtype(args: EngineArgs, device: DeviceName, folder: Path) -> DTypeName:
    if args.dtype != "auto":
        return args.dtype
    if device == "cpu":
        return "float32"
    stored = model_shape.checkpoint_dtype(folder)
    return "float16" if stored == "float16" else "bfloat16"  # float32 on a GPU only when asked for: half the speed


def _max_model_len(args: EngineArgs, shape: ModelShape | None, cache: CacheConfig | None, problems: Problems) -> int:
    """The length asked for, checked; else the default, cut to what the model and a fixed cache hold."""
    n_positions = shape.max_positions if shape else None
    n_cached = cache.n_pages * cache.page_tokens if cache and cache.n_pages else None
    asked = args.max_model_len
    if asked is None:
        return min(n for n in (DEFAULT_MODEL_LEN, n_positions, n_cached) if n is not None)
    problems.check(asked >= MIN_MODEL_LEN, f"--max-model-len {asked}: must be at least {MIN_MODEL_LEN}")
    problems.check(
        n_positions is None or asked <= n_positions,
        f"--max-model-len {asked}: the model has {n_positions} positions (max_position_embeddings in config.json)",
    )
    problems.check(
        n_cached is None or asked <= n_cached,
        f"--max-model-len {asked}: --num-gpu-blocks-override {args.num_gpu_blocks_override} x --block-size "
        f"{args.block_size} holds {n_cached} tokens, less than one request",
    )
    return asked


# ---- cache, scheduler, logprobs ----------------------------------------------------------------------------------


def _cache(args: EngineArgs, problems: Problems) -> CacheConfig:
    n_pages, share = args.num_gpu_blocks_override, args.gpu_memory_utilization
    problems.check(n_pages is None or n_pages >= 1, f"--num-gpu-blocks-override {n_pages}: must be at least 1")
    problems.check(0 < share <= 1, f"--gpu-memory-utilization {share}: must be above 0 and at most 1")
    return CacheConfig(
        page_tokens=args.block_size,
        n_pages=n_pages,
        memory_fraction=share,
        prefix_caching=args.enable_prefix_caching,
        output_caching=args.enable_output_caching,
    )


def _scheduler(
    args: EngineArgs, max_model_len: int | None, device: DeviceName, environ: Mapping[str, str], problems: Problems
) -> SchedulerConfig:
    """`max_model_len` None: it is not known, and what depends on it is not checked."""
    n_seqs = args.max_num_seqs
    problems.check(1 <= n_seqs <= MAX_NUM_SEQS, f"--max-num-seqs {n_seqs}: must be in 1..{MAX_NUM_SEQS}")
    chunked = args.enable_chunked_prefill
    if chunked is None:
        chunked = args.splitwise_role == "mixed" and environ.get("FD_DISABLE_CHUNKED_PREFILL", "0") in ("", "0")
    n_partial, n_long = args.max_num_partial_prefills, args.max_long_partial_prefills
    problems.check(n_partial >= 1, f"--max-num-partial-prefills {n_partial}: must be at least 1")
    problems.check(
        n_partial <= 1 or chunked, f"--max-num-partial-prefills {n_partial}: above 1 needs --enable-chunked-prefill"
    )
    problems.check(
        1 <= n_long <= max(n_partial, 1),
        f"--max-long-partial-prefills {n_long}: must be in 1..{n_partial} (--max-num-partial-prefills)",
    )
    threshold = args.long_prefill_token_threshold
    problems.check(threshold >= 0, f"--long-prefill-token-threshold {threshold}: must be at least 0")
    problems.check(
        max_model_len is None or n_partial <= 1 or threshold < max_model_len,
        f"--long-prefill-token-threshold {threshold}: must be below --max-model-len ({max_model_len}) "
        "when --max-num-partial-prefills is above 1",
    )
    problems.check(args.scheduler_ttl >= 1, f"--scheduler-ttl {args.scheduler_ttl}: must be at least 1 second")
    return SchedulerConfig(
        steps_in_flight=STEPS_IN_FLIGHT["cuda" if args.load_choices == "synthetic" else device],
        max_seqs=n_seqs,
        max_batched_tokens=_max_batched_tokens(args, max_model_len, chunked, device, problems),
        chunked_prefill=chunked,
        max_partial_prefills=n_partial,
        max_long_partial_prefills=n_long,
        long_prefill_tokens=threshold or max(int(LONG_PREFILL_SHARE * (max_model_len or DEFAULT_MODEL_LEN)), 1),
        max_waiting=args.scheduler_max_size if args.scheduler_max_size > 0 else -1,
        waiting_ttl_s=float(args.scheduler_ttl),
    )


def _max_batched_tokens(
    args: EngineArgs, max_model_len: int | None, chunked: bool, device: DeviceName, problems: Problems
) -> int:
    asked, n_seqs = args.max_num_batched_tokens, args.max_num_seqs
    if asked is None:
        wanted = DEFAULT_BATCHED_TOKENS[device]
        if max_model_len is None:
            return wanted
        wanted = max(wanted, n_seqs) if chunked else max(wanted, n_seqs, max_model_len)
        return min(wanted, max_model_len * max(n_seqs, 1))
    flag = f"--max-num-batched-tokens {asked}"
    problems.check(asked >= n_seqs, f"{flag}: must be at least --max-num-seqs ({n_seqs})")
    if chunked:
        problems.check(asked >= args.block_size, f"{flag}: must be at least --block-size ({args.block_size})")
    if max_model_len is not None:
        most = max_model_len * max(n_seqs, 1)
        problems.check(
            asked <= most,
            f"{flag}: must be at most --max-model-len x --max-num-seqs ({max_model_len} x {n_seqs} = {most})",
        )
        problems.check(
            chunked or asked >= max_model_len,
            f"{flag}: must be at least --max-model-len ({max_model_len}) without --enable-chunked-prefill",
        )
    return asked


def _logprobs(args: EngineArgs, model: ModelConfig | None, problems: Problems) -> LogprobsConfig:
    most = args.max_logprobs
    problems.check(most >= -1, f"--max-logprobs {most}: must be at least -1 (-1 is the whole vocabulary)")
    if model is not None:
        n_vocab = model.shape.vocab_size
        problems.check(most <= n_vocab, f"--max-logprobs {most}: the model's vocabulary has {n_vocab} tokens")
    return LogprobsConfig(max_logprobs=most, mode=args.logprobs_mode)
