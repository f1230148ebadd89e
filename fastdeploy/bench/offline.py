"""`bench throughput` and `bench latency`: requests through `LLM`, without HTTP."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from fastdeploy.bench.distribution import Timing, rate_over_time, summaries_ms
from fastdeploy.bench.flags import BenchEngineArgs, LatencyArgs, RequestArgs, ResultArgs, ThroughputArgs
from fastdeploy.bench.report import Report, latency_table, number, table
from fastdeploy.bench.workloads import (
    DEFAULT_SEED,
    LIMITS,
    Lengths,
    Workload,
    fitting,
    folded,
    limits_of,
    make_workload,
    vocabulary_notes,
    workloads_of,
)
from fastdeploy.config.model_shape import read_model_shape
from fastdeploy.errors import ConfigError
from fastdeploy.llm import LLM
from fastdeploy.outputs import RequestOutput
from fastdeploy.sampling_params import SamplingParams

WARMUP = Lengths(8, 32, 8)  # at most
WARMUP_SEED_STEP = 1  # other prompts than those that are measured


def run_throughput(
    args: ThroughputArgs, request_args: RequestArgs, engine: BenchEngineArgs, result_args: ResultArgs, report: Report
) -> int:
    """Measure every workload in one engine, report, and give the exit status: 1 when a request failed."""
    if args.repeat < 1:
        raise ConfigError(f"--repeat {args.repeat}: must be at least 1")
    workloads = workloads_of(request_args)
    engine = with_limits(engine, limits_of(request_args))
    workloads = [fitting(workload, engine.max_model_len) for workload in workloads]
    with _engine(engine, report) as llm:
        for workload in workloads:
            report.note(*workload.notes)
            _warm_up(llm, workload)
            runs = [_measured(llm, workload, result_args) for _ in range(args.repeat)]
            report.results.append({"name": workload.name, "workload": workload.describe(), **runs[-1], "runs": runs})
    report.finish(throughput_table(report.results), result_args)
    return 1 if any(result["n_failed"] for result in report.results) else 0


def run_latency(args: LatencyArgs, engine: BenchEngineArgs, result_args: ResultArgs, report: Report) -> int:
    """Measure batches of each size in one engine, report, and give the exit status: 1 when a request failed."""
    for name, least in (("input_len", 1), ("output_len", 1), ("iterations", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    batch_sizes = args.batch_size or (1,)
    if min(batch_sizes) < 1:
        raise ConfigError(f"--batch-size {min(batch_sizes)}: must be at least 1")
    engine = with_limits(engine, LIMITS)
    if max(batch_sizes) > engine.max_num_seqs:
        report.note(f"batches of more than --max-num-seqs {engine.max_num_seqs} do not run at once")
    with _engine(engine, report) as llm:
        for batch_size in batch_sizes:
            report.results.append(_latency(llm, batch_size, args, engine, result_args))
    report.finish("\n\n".join(latency_text(result) for result in report.results), result_args)
    return 1 if any(result["n_failed"] for result in report.results) else 0


def with_limits(engine: BenchEngineArgs, limits: Mapping[str, int]) -> BenchEngineArgs:
    """The lengths left open filled in: the limits of the workloads, less where the model or the cache hold less."""
    if not engine.model:
        raise ConfigError("--model DIR is needed")
    folder, length = Path(engine.model).expanduser(), engine.max_model_len
    if length is None:
        length = limits["max_model_len"]
        if (folder / "config.json").is_file():  # without it the engine says what is wrong
            length = min(length, read_model_shape(folder).max_positions)
        if engine.num_gpu_blocks_override is not None:
            length = min(length, engine.num_gpu_blocks_override * engine.block_size)
    n_batched = engine.max_num_batched_tokens
    if n_batched is None:
        n_batched = max(min(limits["max_num_batched_tokens"], length * engine.max_num_seqs), engine.max_num_seqs)
    return replace(engine, max_model_len=length, max_num_batched_tokens=n_batched)


def _engine(engine: BenchEngineArgs, report: Report) -> LLM:
    """The engine, once it is up; notes its configuration and how long the start took."""
    start_s = time.perf_counter()
    llm = LLM(**{field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)})
    settings = msgspec.to_builtins(llm.config)
    del settings["log_dir"]
    settings["model"]["path"] = Path(llm.config.model.path).name  # the folders above mean nothing elsewhere
    settings["model"]["served_name"] = Path(llm.config.model.served_name).name
    settings["model"]["tokenizer_path"] = llm.config.model.tokenizer_path and Path(llm.config.model.tokenizer_path).name
    report.config = {
        "model": Path(llm.config.model.path).name,
        "quantization": engine.quantization,
        "start_seconds": time.perf_counter() - start_s,
        "engine": settings,
    }
    report.note(*vocabulary_notes(llm.config.model.shape.vocab_size))
    return llm


def _generate(llm: LLM, workload: Workload, progress: bool) -> tuple[float, float, list[RequestOutput]]:
    """Unix time at the start of the call, its seconds, and the answers."""
    vocab_size = llm.config.model.shape.vocab_size
    prompts = [folded(request.make_ids(), vocab_size) for request in workload.requests]
    params = [
        SamplingParams(temperature=0, ignore_eos=True, min_tokens=n, max_tokens=n)
        for n in (request.n_output for request in workload.requests)
    ]
    started_s, start_s = time.time(), time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=progress)
    seconds = time.perf_counter() - start_s
    assert isinstance(answers, list)  # nothing is streamed
    return started_s, seconds, answers


def _warm_up(llm: LLM, workload: Workload) -> None:
    """A few short requests, so that whatever is made on first use is there."""
    limit = llm.config.model.max_model_len
    n_input, n_output = min(WARMUP.n_input, limit // 2), min(WARMUP.n_output, limit // 2)
    lengths = Lengths(min(WARMUP.n_requests, len(workload.requests)), n_input, n_output)
    _generate(llm, make_workload("warm-up", lengths, workload.seed + WARMUP_SEED_STEP), False)


def _measured(llm: LLM, workload: Workload, result_args: ResultArgs) -> dict[str, Any]:
    """The figures of one run."""
    started_s, seconds, answers = _generate(llm, workload, result_args.progress)
    whole, errors = _sorted_out(answers, [request.n_output for request in workload.requests])
    n_input = sum(len(one.prompt_token_ids) for one in whole)
    n_output = sum(len(one.outputs.token_ids) for one in whole)
    figures: dict[str, Any] = {
        "seconds": seconds,
        "n_answered": len(whole),
        "n_failed": len(answers) - len(whole),
        "errors": errors,
        "input_tokens": n_input,
        "output_tokens": n_output,
        "cached_tokens": sum(one.num_cached_tokens for one in whole),
        "requests_per_s": len(whole) / seconds,
        "input_tokens_per_s": n_input / seconds,
        "output_tokens_per_s": n_output / seconds,
        "total_tokens_per_s": (n_input + n_output) / seconds,
        **summaries_ms([timing(one, started_s) for one in whole]),
        "output_tokens_over_time": _over_time(whole, started_s, seconds),
    }
    if result_args.raw:
        figures["requests"] = [_raw(one, started_s) for one in answers]
    return figures


def _sorted_out(
    answers: Sequence[RequestOutput], n_outputs: Sequence[int]
) -> tuple[list[RequestOutput], dict[str, Any]]:
    """The answers that are whole; per kind of failure how many, and what the first one said."""
    whole: list[RequestOutput] = []
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for answer, n_output in zip(answers, n_outputs, strict=True):
        n_tokens = len(answer.outputs.token_ids)
        if answer.error_code == 200 and n_tokens == n_output:
            whole.append(answer)
            continue
        kind = "wrong_length" if answer.error_code == 200 else f"error_{answer.error_code}"
        first.setdefault(kind, answer.error_msg or f"{n_tokens} tokens instead of {n_output}")
        counts[kind] += 1
    return whole, {kind: {"count": n, "first": first[kind]} for kind, n in counts.items()}


def timing(answer: RequestOutput, started_s: float) -> Timing:
    """From the start of the call (unix time) until the engine had the tokens of a whole answer."""
    first_s, last_s = answer.metrics.engine_recv_first_token_time, answer.metrics.engine_recv_latest_token_time
    assert first_s is not None and last_s is not None  # it has all its tokens
    n_later = len(answer.outputs.token_ids) - 1
    return Timing(first_s - started_s, (last_s - first_s) / n_later if n_later else None, last_s - started_s)


def _over_time(whole: Sequence[RequestOutput], started_s: float, seconds: float) -> dict[str, Any] | None:
    """The engine tells the first and the last token's time of an answer; the others are taken as even between them."""
    if not whole:
        return None
    times_s = [
        np.linspace(one.ttft_s, one.e2e_s, len(answer.outputs.token_ids))
        for answer, one in ((answer, timing(answer, started_s)) for answer in whole)
    ]
    together = np.concatenate(times_s)
    rate = rate_over_time(together, np.ones(len(together)), seconds)
    return {"bucket_s": rate.bucket_s, "tokens_per_s": rate.tokens_per_s}


def _raw(answer: RequestOutput, started_s: float) -> dict[str, Any]:
    first_s, last_s = answer.metrics.engine_recv_first_token_time, answer.metrics.engine_recv_latest_token_time
    return {
        "input_tokens": len(answer.prompt_token_ids),
        "output_tokens": len(answer.outputs.token_ids),
        "cached_tokens": answer.num_cached_tokens,
        "ttft_ms": first_s and round((first_s - started_s) * 1000, 3),
        "e2e_ms": last_s and round((last_s - started_s) * 1000, 3),
        "error": answer.error_msg,
    }


def _latency(
    llm: LLM, batch_size: int, args: LatencyArgs, engine: BenchEngineArgs, result_args: ResultArgs
) -> dict[str, Any]:
    """Batches of one size; every batch has prompts of its own."""
    lengths = Lengths(batch_size, args.input_len, args.output_len)
    seed = DEFAULT_SEED if args.workload_seed is None else args.workload_seed

    def batch(number: int) -> Workload:
        return fitting(make_workload(f"batch {batch_size}", lengths, seed + number), engine.max_model_len)

    for i in range(args.warmup):
        _generate(llm, batch(args.iterations + i), False)
    numbers = tqdm(range(args.iterations), desc=f"batch {batch_size}", unit="batch", disable=not result_args.progress)
    measured = [_generate(llm, batch(number), False) for number in numbers]
    timings: list[Timing] = []
    raw: list[dict[str, Any]] = []
    errors: dict[str, Any] = {}
    for started_s, _, answers in measured:
        whole, found = _sorted_out(answers, [args.output_len] * batch_size)
        timings += [timing(one, started_s) for one in whole]
        raw += [_raw(one, started_s) for one in answers]
        errors |= found
    total_s = sum(seconds for _, seconds, _ in measured)
    n_answers = batch_size * args.iterations
    result: dict[str, Any] = {
        "name": f"batch {batch_size}",
        "batch_size": batch_size,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "iterations": args.iterations,
        "n_failed": n_answers - len(timings),
        "errors": errors,
        "batch_seconds": [seconds for _, seconds, _ in measured],
        "output_tokens_per_s": len(timings) * args.output_len / total_s,
        **summaries_ms(timings),
    }
    return {**result, "requests": raw} if result_args.raw else result


Row = tuple[str, Callable[[Mapping[str, Any]], str]]
_COLUMNS: tuple[Row, ...] = (
    ("workload", lambda r: str(r["name"])),
    ("requests", lambda r: str(r["n_answered"])),
    ("seconds", lambda r: number(r["seconds"])),
    ("output tokens/s", lambda r: number(r["output_tokens_per_s"])),
    ("input tokens/s", lambda r: number(r["input_tokens_per_s"])),
    ("total tokens/s", lambda r: number(r["total_tokens_per_s"])),
    ("requests/s", lambda r: number(r["requests_per_s"])),
    ("output tokens/s of each run", lambda r: ", ".join(number(run["output_tokens_per_s"]) for run in r["runs"])),
)


def throughput_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per workload, of its last run; below it what failed."""
    rows = [tuple(title for title, _ in _COLUMNS)]
    rows += [tuple(text(result) for _, text in _COLUMNS) for result in results]
    return "\n".join([table(rows), *_failures(results)])


def latency_text(result: Mapping[str, Any]) -> str:
    """The table of one batch size."""
    title = (
        f"{result['name']}: {result['iterations']} times, {result['input_len']} tokens in, {result['output_len']} out, "
        f"{number(result['output_tokens_per_s'])} output tokens/s"
    )
    summaries = {name: result[name] for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    return "\n".join([title, latency_table(summaries), *_failures([result])])


def _failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"failed: {result['name']}: {error['count']} x {kind}: {error['first']}"
        for result in results
        for kind, error in result["errors"].items()
    ]
