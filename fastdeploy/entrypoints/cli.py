"""The `fastdeploy` command: a table of subcommands, each imported when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastdeploy import __version__
from fastdeploy.errors import ConfigError, FastDeployError

if TYPE_CHECKING:
    from fastdeploy.config.args import EngineArgs

REPORTED_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "pyzmq",
    "msgspec",
    "starlette",
    "uvicorn",
)


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: what it does, and a function of its arguments that gives the exit status (None is 0)."""

    help: str
    run: Callable[[Sequence[str]], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastdeploy ARGS`; returns the exit status: 0, 1 for a failure, 2 for a wrong flag or configuration."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"fastdeploy {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            from fastdeploy.config.flags import suggestion

            hint = suggestion(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise ConfigError(f"no subcommand {name!r}{hint}")
        return COMMANDS[name].run(args[1:]) or 0
    except FastDeployError as exc:
        for line in str(exc).splitlines():
            print(f"fastdeploy: error: {line}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastdeploy COMMAND [flags]",
            "",
            "A server for large language models, with OpenAI's HTTP API.",
            "",
            "commands:",
            *lines,
            "",
            "`fastdeploy COMMAND --help` lists the flags of a command, `fastdeploy --version` names the version.",
            "",
            "example:",
            "  fastdeploy serve $(fastdeploy demo-model) --port 8000",
            "  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\",
            """    -d '{"model": "default", "messages": [{"role": "user", "content": "Hello!"}]}'""",
        ]
    )


def _serve(argv: Sequence[str]) -> int | None:
    """All flags are the api_server's; a first argument that is no flag is the model."""
    args = list(argv)
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    status: int | None = import_module("fastdeploy.entrypoints.openai.api_server").main(args)
    return status


def _demo_model(argv: Sequence[str]) -> None:
    """The folder is the last line of stdout, for `$(fastdeploy demo-model)`."""
    from fastdeploy.config.flags import FlagParser

    parser = FlagParser(
        prog="fastdeploy demo-model",
        description="Build a small checkpoint in the cache folder, unless it is there, and print its folder.",
    )
    parser.add_argument("--form", choices=("moe", "dense"), default="moe", help="which checkpoint (default: moe)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    flags = parser.parse_flags(argv)
    from fastdeploy.demo.model import build_demo_model

    print(build_demo_model(form=flags.form, show_progress=not flags.quiet))


def _demo(argv: Sequence[str]) -> None:
    """Server, requests, report; the work is in `demo.session`."""
    from fastdeploy.config.flags import FlagParser

    parser = FlagParser(
        prog="fastdeploy demo",
        description="Start a server with a small model, ask it a few things, show answers and timings, stop it.",
    )
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer (default: 48)")
    flags = parser.parse_flags(argv)
    from fastdeploy.demo.session import run_demo

    run_demo(flags.max_tokens)


def _serve_demo(argv: Sequence[str]) -> int | None:
    """All flags are the api_server's, with a model and a port to begin with."""
    if any(flag in ("-h", "--help") for flag in argv):
        return _serve(argv)
    from fastdeploy.demo.session import serve_demo

    return serve_demo(argv)


def _bench(argv: Sequence[str]) -> int | None:
    """The benchmarks have a table of their own."""
    status: int | None = import_module("fastdeploy.bench.command").main(argv)
    return status


def _redis(argv: Sequence[str]) -> int | None:
    """Runs until it is interrupted."""
    status: int | None = import_module("fastdeploy.admission.private_redis").main(argv)
    return status


def _check(argv: Sequence[str]) -> None:
    """What is installed and found; with --model, what an engine with these flags would be or need."""
    from fastdeploy.config.args import EngineArgs
    from fastdeploy.config.flags import build_parser

    parser = build_parser(
        "fastdeploy check",
        EngineArgs,
        usage="%(prog)s [--model DIR] [--plan [GPU]] [flags]",
        epilog="Examples:\n  fastdeploy check --model DIR --max-model-len 8192\n"
        "  fastdeploy check --plan h200 --model DIR --data-parallel-size 8 --enable-expert-parallel",
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        const="here",
        metavar="GPU",
        help="show what each rank will hold in memory: here, or with enough GPUs of that kind (h100, h200, b200, or "
        "their memory, as in 80GiB); needs only config.json",
    )
    namespace = parser.parse_flags(argv)
    args = EngineArgs.from_namespace(namespace)
    if namespace.plan is not None:
        from fastdeploy.entrypoints.plan_report import plan_report

        print(plan_report(args, namespace.plan))
        return
    print(environment_report())
    if args.model:
        print("\n" + engine_report(args))


def environment_report(environ: Mapping[str, str] = os.environ) -> str:
    """Versions, devices and the folders in use, as lines of `name: value`; imports nothing heavy."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from fastdeploy.config.hardware import cuda_devices, memory_bytes, n_usable_cpus
    from fastdeploy.config.resolve import log_dir

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    lines = [
        f"fastdeploy: {__version__} ({Path(__file__).parent.parent})",
        f"python: {platform.python_version()} ({sys.executable})",
        f"system: {platform.system()} {platform.release()} {platform.machine()}",
        f"cpus: {n_usable_cpus()} usable, {memory_bytes() / 2**30:.1f} GiB memory",
    ]
    devices = cuda_devices()
    for index, device in enumerate(devices):
        capability = ".".join(map(str, device.capability))
        lines.append(f"cuda:{index}: {device.name}, {device.memory_bytes / 2**30:.1f} GiB, capability {capability}")
    if not devices:
        lines.append("cuda: no device")
    lines += [f"{package}: {version_of(package)}" for package in REPORTED_PACKAGES]
    lines.append(f"log folder: {log_dir(environ)}")
    lines += [f"{name}={value}" for name, value in sorted(environ.items()) if name in _SHOWN_VARIABLES]
    return "\n".join(lines)


# No variable that may hold a secret.
_SHOWN_VARIABLES = frozenset(
    {"CUDA_VISIBLE_DEVICES", "FD_CACHE_DIR", "FD_DEBUG", "FD_DISABLE_CHUNKED_PREFILL", "FD_LOG_DIR", "OMP_NUM_THREADS"}
)


def engine_report(args: EngineArgs) -> str:
    """The resolved configuration as JSON; raises ConfigError when the flags contradict."""
    import json
    import re

    import msgspec

    from fastdeploy.config.resolve import resolve

    text = json.dumps(msgspec.to_builtins(resolve(args)), indent=2)
    return re.sub(r"\[[\d,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # one line per list


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "serve": Command("start a server: fastdeploy serve MODEL [flags]", _serve),
        "demo": Command("start a server with a small model, ask it a few things, stop it", _demo),
        "serve-demo": Command("start a server with that model on port 8180, until Ctrl-C", _serve_demo),
        "demo-model": Command("build a small model to try things with, print its folder", _demo_model),
        "bench": Command("measure an engine or a running server: throughput, latency, serve", _bench),
        "redis": Command("run a private Redis for --scheduler-name splitwise or global, until Ctrl-C", _redis),
        "check": Command(
            "show what is installed; with --model, the configuration; with --plan, the memory of each rank", _check
        ),
    }
)

if __name__ == "__main__":
    sys.exit(main())
