"""`bench serve`: a workload against a running server, and what its clients would feel."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import uvloop
from tqdm import tqdm

from fastdeploy.bench.arrivals import arrival_times_s
from fastdeploy.bench.connection import ExchangeFailed, HttpClient
from fastdeploy.bench.distribution import parse_limits
from fastdeploy.bench.flags import RequestArgs, ResultArgs, ServeArgs
from fastdeploy.bench.load import Answer, LoadGenerator, Target
from fastdeploy.bench.report import Report
from fastdeploy.bench.serve_figures import figures, notes, raw, shown
from fastdeploy.bench.workloads import END_ID, FIRST_ID, Request, Workload, vocabulary_notes, workloads_of
from fastdeploy.errors import ConfigError, FastDeployError

WARMUP_TOKENS = 8
WARMUP_SEEDS = 2  # a family of seeds beside those of traces
MODELS_PATH = "/v1/models"
WANTED_FILES = 65536


class ServerRefused(FastDeployError):
    """The server under test is not there, or refuses what is needed before anything can be measured."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent: `concurrency` is set in a closed loop, `rate` with random times, neither for a trace."""

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        if self.concurrency is not None:
            return {"mode": "closed loop", "concurrency": self.concurrency}
        if self.rate is not None:
            return {"mode": "open loop", "request_rate": self.rate, "burstiness": self.burstiness}
        return {"mode": "open loop", "arrivals": "as in the trace"}


def run_serve(args: ServeArgs, request_args: RequestArgs, result_args: ResultArgs, report: Report) -> int:
    """Measure, report, and give the exit status.

    It is 1 when nothing was answered or the server went away, 130 when the user ended it.
    """
    limits_s = parse_limits(args.goodput)
    _check(args)
    workloads = workloads_of(request_args)
    client = HttpClient(args.base_url, args.api_key, args.timeout)
    _allow_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stopped = runner.run(_measure_all(args, client, workloads, limits_s, result_args, report))
    report.finish("\n\n".join(shown(result) for result in report.results), result_args)
    if stopped == "interrupted":
        return 130
    return 1 if stopped or not all(result["n_answered"] for result in report.results) else 0


async def _measure_all(
    args: ServeArgs,
    client: HttpClient,
    workloads: Sequence[Workload],
    limits_s: Mapping[str, float],
    result_args: ResultArgs,
    report: Report,
) -> str | None:
    """Fills the report; gives why it ended early, if it did. Raises ServerRefused."""
    async with client.watched():
        model, max_model_len = await _model_of(client, args.model)
        target = Target(
            endpoint=args.endpoint,
            model=model,
            vocab_size=args.vocab_size,
            text_prompts=args.text_prompts,
            exact_length=args.exact_length,
            extra_body=args.extra_body or {},
        )
        report.config = {
            "model": model,
            "max_model_len": max_model_len,
            "url": client.url,
            "endpoint": args.endpoint,
            "exact_length": args.exact_length,
            "extra_body": args.extra_body or {},
            "goodput_limits_ms": {name: limit * 1000 for name, limit in limits_s.items()},
        }
        report.note(*vocabulary_notes(args.vocab_size))
        await _warm_up(client, target, workloads[0], args.warmup)
        for workload in workloads:
            load = _load(args, workload)
            requests = _timed(workload, load)
            with _progress(workload, result_args.progress) as on_end, _steady_memory():
                generator = LoadGenerator(client, target, on_end)
                if load.concurrency is not None:
                    run = await generator.closed_loop(requests, load.concurrency)
                else:
                    run = await generator.open_loop(requests)
            result = figures(workload, load.describe(), run, limits_s)
            if result_args.raw:
                result["requests"] = [raw(answer, run) for answer in sorted(run.answers, key=lambda one: one.index)]
            report.results.append(result)
            report.note(*workload.notes, *notes(run, workload, args.exact_length))
            if run.stopped:
                return run.stopped
    return None


def _check(args: ServeArgs) -> None:
    if args.concurrency is not None and args.request_rate is not None:
        raise ConfigError("--concurrency and --request-rate: give only one of them")
    for name in ("concurrency", "request_rate", "burstiness", "timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.warmup < 0:
        raise ConfigError(f"--warmup {args.warmup}: must be at least 0")
    if not args.endpoint.startswith("/"):
        raise ConfigError(f"--endpoint {args.endpoint}: expected a path such as /v1/completions")


def _load(args: ServeArgs, workload: Workload) -> Load:
    if args.request_rate is not None:
        return Load(rate=args.request_rate, burstiness=args.burstiness)
    if args.concurrency is None and workload.timed:
        return Load()
    return Load(concurrency=args.concurrency or len(workload.requests))


def _timed(workload: Workload, load: Load) -> list[Request]:
    if load.rate is None:
        return list(workload.requests)
    times_s = arrival_times_s(len(workload.requests), load.rate, load.burstiness, workload.seed)
    return [replace(one, arrival_s=at_s) for one, at_s in zip(workload.requests, times_s, strict=True)]


async def _model_of(client: HttpClient, name: str | None) -> tuple[str, int | None]:
    """The model to ask for and the server's length limit, if it tells. Raises ServerRefused."""
    try:
        status, body = await client.get(MODELS_PATH)
    except ExchangeFailed as exc:
        raise ServerRefused(f"--base-url: no answer from the server: {exc}") from None
    try:
        cards = msgspec.json.decode(body)["data"] if status == 200 else []
        card: dict[str, Any] = next((one for one in cards if name in (None, one["id"])), {})
        found, limit = name or card.get("id"), card.get("max_model_len")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        found, limit = name, None
    if not isinstance(found, str):
        raise ServerRefused(f"{client.url}{MODELS_PATH} answers {status} and names no model; give --model")
    return found, limit if isinstance(limit, int) else None


async def _warm_up(client: HttpClient, target: Target, workload: Workload, n_requests: int) -> None:
    """As long as the first request but for its answer, with other prompts. Raises ServerRefused when one fails."""
    first = workload.requests[0]
    generator = LoadGenerator(client, target, lambda answer: None)
    for i in range(n_requests):
        ids = np.random.default_rng((workload.seed, WARMUP_SEEDS, i)).integers(FIRST_ID, END_ID, size=first.n_input)
        request = Request(first.n_input, min(first.n_output, WARMUP_TOKENS), partial(np.copy, ids))
        answer = await generator.send(i, request, target.body(request))
        if answer.error is not None:
            raise ServerRefused(f"the warm-up request failed: {answer.error}: {answer.error_text}")


@contextmanager
def _progress(workload: Workload, wanted: bool) -> Iterator[Any]:
    """A bar over requests with the rate of tokens so far."""
    n_tokens = n_failed = 0
    with tqdm(total=len(workload.requests), desc=workload.name, unit="request", disable=not wanted) as bar:

        def on_end(answer: Answer) -> None:
            nonlocal n_tokens, n_failed
            n_tokens, n_failed = n_tokens + answer.n_output, n_failed + (answer.error is not None)
            rate = n_tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.0f} output tokens/s, {n_failed} failed", refresh=False)
            bar.update()

        yield on_end


@contextmanager
def _steady_memory() -> Iterator[None]:
    """Prompts and whatever else lives already is not looked through by the garbage collector while times are taken."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _allow_connections() -> None:
    """As many open files as this user may have: a stream is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
