"""`fastdeploy bench throughput | latency | serve`: flags and help; the work is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fastdeploy.bench.flags import (
    BenchEngineArgs,
    LatencyArgs,
    RequestArgs,
    ResultArgs,
    ServeArgs,
    ThroughputArgs,
)
from fastdeploy.config.flags import build_parser, suggestion
from fastdeploy.errors import ConfigError

Run = Callable[[argparse.Namespace, Sequence[str]], int]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark: its flags, what its help says, and what runs it (a function of flags and command line)."""

    help: str
    usage: str
    description: str
    examples: str
    flags: tuple[type, ...]
    run: Run


def main(argv: Sequence[str]) -> int:
    """Run `fastdeploy bench ARGS`; gives the exit status. Raises FastDeployError."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name not in BENCHMARKS:
        raise ConfigError(
            f"no benchmark {name!r}{suggestion(name, BENCHMARKS) or '; there are ' + ', '.join(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS[name]
    parser = build_parser(
        f"fastdeploy bench {name}", *benchmark.flags, usage=benchmark.usage, epilog=f"Examples:\n{benchmark.examples}"
    )
    parser.description = benchmark.description
    parser.set_defaults(max_num_seqs=None)  # tells whether it was given; see `_engine_args`
    return benchmark.run(parser.parse_flags(argv[1:]), argv)


def _overview() -> str:
    width = max(map(len, BENCHMARKS))
    return "\n".join(
        [
            "usage: fastdeploy bench BENCHMARK [flags]",
            "",
            "Measures how fast an engine or a server is, on requests that are the same every time.",
            "",
            "benchmarks:",
            *(f"  {name:<{width}}  {benchmark.help}" for name, benchmark in BENCHMARKS.items()),
            "",
            "`fastdeploy bench BENCHMARK --help` lists its flags.",
            "",
            "examples:",
            *(benchmark.examples.splitlines()[0] for benchmark in BENCHMARKS.values()),
        ]
    )


def _engine_args(flags: argparse.Namespace, limits: Mapping[str, int]) -> BenchEngineArgs:
    """The engine's flags; the number of sequences is that of `limits` unless it was given."""
    if flags.max_num_seqs is None:
        flags.max_num_seqs = limits["max_num_seqs"]
    return BenchEngineArgs.from_namespace(flags)


def _throughput(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    from fastdeploy.bench.report import Report, check_result_args

    result = ResultArgs.from_namespace(flags)
    check_result_args(result)
    from fastdeploy.bench.offline import run_throughput
    from fastdeploy.bench.workloads import limits_of

    requests = RequestArgs.from_namespace(flags)
    engine = _engine_args(flags, limits_of(requests))
    return run_throughput(ThroughputArgs.from_namespace(flags), requests, engine, result, Report("throughput", argv))


def _latency(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    from fastdeploy.bench.report import Report, check_result_args

    result = ResultArgs.from_namespace(flags)
    check_result_args(result)
    from fastdeploy.bench.offline import run_latency
    from fastdeploy.bench.workloads import LIMITS

    engine = _engine_args(flags, LIMITS)
    return run_latency(LatencyArgs.from_namespace(flags), engine, result, Report("latency", argv))


def _serve(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    from fastdeploy.bench.report import Report, check_result_args

    result = ResultArgs.from_namespace(flags)
    check_result_args(result)
    from fastdeploy.bench.serve import run_serve

    return run_serve(ServeArgs.from_namespace(flags), RequestArgs.from_namespace(flags), result, Report("serve", argv))


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "throughput": Benchmark(
            help="tokens a second of an engine that has all requests at once, without HTTP",
            usage="%(prog)s --model DIR [which requests] [flags of the engine]",
            description=(
                "Starts an engine, gives it all requests of a workload at once and counts tokens a second. Greedy, "
                "end-of-text ignored,\nexact output lengths, prefix caching off. A small warm-up, then --repeat runs; "
                "the last one counts."
            ),
            examples=(
                "  fastdeploy bench throughput --model DIR --workload decode64,prefill --output figures.json\n"
                "  fastdeploy bench throughput --model DIR --requests 16 --input-len 512 --output-len 64\n"
                "  fastdeploy bench throughput --model DIR --trace azure_conv_2023.csv --max-requests 500"
            ),
            flags=(RequestArgs, ThroughputArgs, ResultArgs, BenchEngineArgs),
            run=_throughput,
        ),
        "latency": Benchmark(
            help="times until the first token, per token and to the end, of batches, without HTTP",
            usage="%(prog)s --model DIR [--batch-size A,B] [flags of the engine]",
            description=(
                "Starts an engine and gives it one batch of equal requests after the other. Tells mean and percentiles "
                "over all requests:\ntime to first token (from the call until the engine has it), time per output "
                "token after it, end to end."
            ),
            examples=(
                "  fastdeploy bench latency --model DIR --batch-size 1,16,64 --input-len 1024 --output-len 128\n"
                "  fastdeploy bench latency --model DIR --iterations 30 --output figures.json --plot figures.svg"
            ),
            flags=(LatencyArgs, ResultArgs, BenchEngineArgs),
            run=_latency,
        ),
        "serve": Benchmark(
            help="latencies and throughput that clients of a running server see, any OpenAI-compatible one",
            usage="%(prog)s [--base-url URL] [which requests] [--concurrency N | --request-rate X]",
            description=(
                "Sends requests to a running server and streams the answers. All at once, in a closed loop "
                "(--concurrency), at random times\n(--request-rate) or at those of a trace. Tells throughput and "
                "percentiles of TTFT, TPOT, ITL and E2E latency.\n\n"
                "TTFT: from sending a request until its first token. TPOT: from the first to the last token, per token "
                "after the first.\nITL: each single gap between events of a stream. Failed requests are counted by "
                "kind and are in no latency."
            ),
            examples=(
                "  fastdeploy bench serve --base-url http://127.0.0.1:8000 --workload decode64 --concurrency 16\n"
                "  fastdeploy bench serve --request-rate 4 --requests 200 --input-len 512 --goodput ttft:500 tpot:50\n"
                "  fastdeploy bench serve --trace mooncake_conversation.jsonl --max-requests 300 --length-scale 0.1 "
                "--plot serve.png\n"
                "  fastdeploy bench serve --base-url https://HOST/v1 --api-key KEY --endpoint /v1/chat/completions "
                "--no-exact-length"
            ),
            flags=(RequestArgs, ServeArgs, ResultArgs),
            run=_serve,
        ),
    }
)
