"""Flags of the benchmarks, as `config.flags` reads them. Those of the engine come from `config.args`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated

from fastdeploy.config.args import CACHE, MODEL, SCHEDULER, EngineArgs, Json
from fastdeploy.config.flags import Flag, read_flags

REQUESTS = "Requests: lengths, or a workload by name, or a trace"
MEASURE = "Measurement"
SERVER = "Server under test"
LOAD = "Load (left out: all requests at once, those of a trace at its times)"
RESULT = "Result"


@dataclass(frozen=True, kw_only=True)
class RequestArgs:
    """Which requests are sent; prompts are random token ids, the same ones every time."""

    requests: Annotated[int | None, Flag(REQUESTS, "How many requests of equal lengths. (default: 64)")] = None
    input_len: Annotated[int | None, Flag(REQUESTS, "Prompt tokens of each. (default: 128)")] = None
    output_len: Annotated[int | None, Flag(REQUESTS, "Output tokens of each. (default: 128)")] = None
    workload: Annotated[
        tuple[str, ...],
        Flag(REQUESTS, "Workloads, one run after the other: single, decode64, decode256, mixed, prefill.", None, "A,B"),
    ] = ()
    workloads: Annotated[
        str | None,
        Flag(REQUESTS, "JSON file of workloads; --workload picks some of them, otherwise all run.", metavar="FILE"),
    ] = None
    trace: Annotated[
        str | None,
        Flag(REQUESTS, "Recorded requests: Azure's CSV or Mooncake's JSONL; the content tells which.", metavar="FILE"),
    ] = None
    time_scale: Annotated[
        float, Flag(REQUESTS, "Times of the trace are multiplied by this: 0.5 plays it twice as fast.")
    ] = 1.0
    length_scale: Annotated[
        float, Flag(REQUESTS, "Lengths of the trace, shared prefixes included, are multiplied by this.")
    ] = 1.0
    max_requests: Annotated[int | None, Flag(REQUESTS, "Take only the first N requests.")] = None
    max_total_len: Annotated[
        int | None, Flag(REQUESTS, "Leave out requests of more tokens, prompt and output; the report counts them.")
    ] = None
    workload_seed: Annotated[
        int | None, Flag(REQUESTS, "Seed of prompts and arrival times. (default: that of the file, else 20261121)")
    ] = None

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> RequestArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)


@dataclass(frozen=True, kw_only=True)
class ResultArgs:
    """Where the figures go besides the table on stdout."""

    output: Annotated[
        str | None, Flag(RESULT, "JSON file: all figures, versions, command, hardware.", metavar="FILE")
    ] = None
    raw: Annotated[bool, Flag(RESULT, "With --output: times of every single request too.")] = False
    plot: Annotated[
        str | None,
        Flag(RESULT, "Picture (.png, .svg or .pdf) of latencies and throughput; needs matplotlib.", metavar="FILE"),
    ] = None
    progress: Annotated[bool, Flag(RESULT, "Show a progress bar on stderr.")] = True

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> ResultArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)


@dataclass(frozen=True, kw_only=True)
class ThroughputArgs:
    """How `bench throughput` measures."""

    repeat: Annotated[int, Flag(MEASURE, "Runs of each workload; the last one counts, the file has all.")] = 2

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> ThroughputArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)


@dataclass(frozen=True, kw_only=True)
class LatencyArgs:
    """How `bench latency` measures."""

    batch_size: Annotated[
        tuple[int, ...],
        Flag(MEASURE, "Requests that start together; several sizes are measured in turn. (default: 1)", None, "A,B"),
    ] = ()
    input_len: Annotated[int, Flag(MEASURE, "Prompt tokens of each request.")] = 128
    output_len: Annotated[int, Flag(MEASURE, "Output tokens of each request.")] = 128
    iterations: Annotated[int, Flag(MEASURE, "Batches that are measured.")] = 10
    warmup: Annotated[int, Flag(MEASURE, "Batches before those.")] = 2
    workload_seed: Annotated[int | None, Flag(MEASURE, "Seed of the prompts. (default: 20261121)")] = None

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> LatencyArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """Which server `bench serve` asks, and how hard."""

    base_url: Annotated[str, Flag(SERVER, "Address of an OpenAI-compatible server.", metavar="URL")] = (
        "http://127.0.0.1:8000"
    )
    endpoint: Annotated[
        str, Flag(SERVER, "/v1/completions (prompts as token ids) or /v1/chat/completions (as text).", metavar="PATH")
    ] = "/v1/completions"
    model: Annotated[
        str | None, Flag(SERVER, "Model to ask for. (default: the first of /v1/models)", metavar="NAME")
    ] = None
    api_key: Annotated[
        str | None, Flag(SERVER, "Sent as 'Authorization: Bearer KEY'; never written to the result.", metavar="KEY")
    ] = None
    vocab_size: Annotated[
        int | None, Flag(SERVER, "Token ids of the model, if fewer than 100000: prompts keep below it.")
    ] = None
    text_prompts: Annotated[
        bool, Flag(SERVER, "Send words instead of token ids, about one word a token; /v1/chat/completions always does.")
    ] = False
    exact_length: Annotated[
        bool,
        Flag(SERVER, "Ask for exactly the output length (ignore_eos, min_tokens); off for servers that refuse it."),
    ] = True
    extra_body: Annotated[Json | None, Flag(SERVER, "Merged into every request.")] = None
    timeout: Annotated[float, Flag(SERVER, "Seconds of silence after which a request counts as failed.")] = 600.0

    concurrency: Annotated[
        int | None, Flag(LOAD, "Closed loop: N requests at any time, the next starts when one ends.")
    ] = None
    request_rate: Annotated[float | None, Flag(LOAD, "Open loop: X requests a second on average, at random times.")] = (
        None
    )
    burstiness: Annotated[
        float, Flag(LOAD, "With --request-rate: 1 is a Poisson process, less is burstier, more is more even.")
    ] = 1.0
    warmup: Annotated[int, Flag(LOAD, "Requests before the measurement; if one fails, nothing is measured.")] = 1
    goodput: Annotated[
        tuple[str, ...],
        Flag(
            RESULT,
            "Count requests that keep these limits in ms, e.g. --goodput ttft:500 tpot:50 e2e:10000.",
            None,
            "NAME:MS",
        ),
    ] = ()

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> ServeArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)


@dataclass(frozen=True, kw_only=True)
class BenchEngineArgs(EngineArgs):
    """The engine's flags with the limits that offline benchmarks are compared at."""

    max_model_len: Annotated[
        int | None,
        Flag(MODEL, "Most tokens of a request, prompt and output. (default: 8192, less if the model holds less)"),
    ] = None
    max_num_seqs: Annotated[int, Flag(SCHEDULER, "Most requests that run at once, 1 to 256.")] = 256
    max_num_batched_tokens: Annotated[
        int | None,
        Flag(SCHEDULER, "Most tokens of one step. (default: 8192, at most --max-model-len x --max-num-seqs)"),
    ] = None
    enable_prefix_caching: Annotated[
        bool, Flag(CACHE, "Reuse the pages of prompts that begin alike; repeated runs then find their own prompts.")
    ] = False

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> BenchEngineArgs:
        """From a command line parsed by `flags.build_parser`."""
        return read_flags(cls, namespace)
