"""`fd-router` and `python -m fastdeploy.router.launch`: one endpoint in front of many servers."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import fastdeploy
from fastdeploy.config.flags import FlagParser
from fastdeploy.errors import ConfigError, FastDeployError
from fastdeploy.observability.logs import CONSOLE, ROOT, close_logging, setup_logging
from fastdeploy.router.config import RouterConfig, load_config, load_instances, without_effect
from fastdeploy.router.placement import PairSettings
from fastdeploy.router.policies import POLICIES
from fastdeploy.router.workers import MAX_WORKERS, Group

PROGRAM = "python -m fastdeploy.router.launch"
COMMAND = "fd-router"
GC_THRESHOLD = 50_000  # objects; Python looks after 700
DEFAULT_PORT = 9000  # of the module; the command has none
CONSOLE_LOGGER = logging.getLogger(CONSOLE)
_LEVELS = {"warn": logging.WARNING, "warning": logging.WARNING, "error": logging.ERROR}
EPILOG = """Example:
  fd-router --port 30000
  python -m fastdeploy.entrypoints.openai.api_server --model DIR --port 8000 --router 127.0.0.1:30000
  curl http://127.0.0.1:30000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Hello"}'

Logs are written to $FD_LOG_DIR/router.log (log/router.log)."""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Routes until it is told to stop. Returns 0 after an orderly end, 2 for wrong flags or a busy port, 130 when a
    second signal cut the end short."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        flags = _parser(program).parse_flags(args)
        if flags.version:
            print(f"{COMMAND} {fastdeploy.__version__} (Python {platform.python_version()}, {platform.machine()})")
            return 0
        return _start(_config(flags, DEFAULT_PORT if program == PROGRAM else None), os.environ)
    except FastDeployError as exc:
        for line in str(exc).splitlines():
            print(f"{COMMAND}: error: {line}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def fd_router() -> int:
    """The console script."""
    return main(program=COMMAND)


def _config(flags: argparse.Namespace, default_port: int | None) -> RouterConfig:
    """Flags and file together. Raises `ConfigError`."""
    config = load_config(flags.config_path, flags.host, flags.port, flags.splitwise)
    for name in ("preempt_retry_count", "pd_min_prompt_tokens"):
        if getattr(flags, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be 0 or more")
    if not 1 <= flags.workers <= MAX_WORKERS:
        raise ConfigError(f"--workers {flags.workers}: must be in 1..{MAX_WORKERS}")
    if flags.request_timeout_secs <= 0:
        raise ConfigError(f"--request-timeout-secs {flags.request_timeout_secs:g}: must be more than 0")
    port = config.server.port if config.server.port is not None else default_port
    if port is None:
        raise ConfigError("--port: no port was given; name one, or server.port in the file of --config_path")
    scheduler = config.scheduler
    if flags.policy is not None:
        scheduler = dataclasses.replace(scheduler, policy=flags.policy)
    return dataclasses.replace(
        config,
        server=dataclasses.replace(config.server, port=port),
        scheduler=scheduler,
        pairs=PairSettings(
            min_prompt_tokens=flags.pd_min_prompt_tokens,
            preempt_retry_count=flags.preempt_retry_count,
            preempt_retry_exclude_decode=flags.preempt_retry_exclude_decode,
        ),
        request_timeout_s=flags.request_timeout_secs,
        workers=flags.workers,
    )


def _start(config: RouterConfig, environ: Mapping[str, str]) -> int:
    from fastdeploy.config.resolve import log_dir
    from fastdeploy.entrypoints.openai.server import address_of
    from fastdeploy.router.workers import bind_group, run_workers

    assert config.server.port is not None
    with ExitStack() as stack:
        sockets = bind_group(stack, config.server.host, config.server.port, config.workers)
        setup_logging(log_dir(environ), "router", config.log.output != "file", environ=_log_environ(config, environ))
        stack.callback(close_logging)
        if config.log.level in _LEVELS:
            logging.getLogger(ROOT).setLevel(_LEVELS[config.log.level])
        for line in without_effect(config):
            CONSOLE_LOGGER.warning(line)
        shown = f"policy {config.scheduler.policy}"
        if config.server.splitwise:
            shown = f"policies {config.scheduler.prefill_policy} and {config.scheduler.decode_policy}"
        CONSOLE_LOGGER.info("Starting server on %s, %s", address_of(sockets[0]), shown)
        gc.freeze()  # a request's objects are freed by their counts: looking for cycles often costs time only
        gc.set_threshold(GC_THRESHOLD)
        if config.workers == 1:
            return _run(config, sockets[0], None)
        if config.manager.register_path:
            load_instances(config.manager.register_path)  # what is wrong with it is said once, here
        return run_workers(sockets, lambda group, sock: _run(config, sock, group))


def _run(config: RouterConfig, sock: socket.socket, group: Group | None) -> int:
    import uvloop

    from fastdeploy.router.server import serve

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD))
        in_order = runner.run(serve(config, sock, group))
    return 0 if in_order else 130


def _log_environ(config: RouterConfig, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment that logging reads, with what the file says where the environment says nothing."""
    from_file = {"FD_LOG_BACKUP_COUNT": str(config.log.max_age_days)}
    if config.log.level == "debug":
        from_file["FD_DEBUG"] = "1"
    return {**from_file, **environ}


def _bool(text: str) -> bool:
    if text.lower() in ("true", "t", "1"):
        return True
    if text.lower() in ("false", "f", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _parser(program: str) -> FlagParser:
    parser = FlagParser(
        prog=program,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    switch = {"nargs": "?", "const": True, "type": _bool, "metavar": "BOOL"}
    port_note = f"default: {DEFAULT_PORT}" if program == PROGRAM else "needed here or in the file"

    def add(name: str, help_text: str, **kind: object) -> None:
        parser.add_argument(f"--{name}", f"-{name}", help=help_text, **kind)  # type: ignore[arg-type]

    add("host", "address to listen on (default: 0.0.0.0)")
    add("port", f"port to listen on, 0 for a free one ({port_note})", type=int, metavar="N")
    add("config-path", "YAML file; flags win over it", default="", metavar="FILE")
    parser.add_argument("-config_path", dest="config_path", default="", help=argparse.SUPPRESS)
    add("policy", "how a server is chosen (default: request_num)", choices=tuple(POLICIES), metavar="NAME")
    add("request-timeout-secs", "longest a request may take (default: 1800)", type=float, default=1800.0, metavar="X")
    add("workers", "processes that share the port (default: 1)", type=int, default=1, metavar="N")
    add("splitwise", "pair prefill and decode servers", **switch)
    count: dict[str, object] = {"type": int, "metavar": "N"}
    add(
        "preempt-retry-count",
        "how often to repeat what decode gave up, with --splitwise (default: 3)",
        default=3,
        **count,
    )
    add("preempt-retry-exclude-decode", "repeat it with another decode server", default=False, **switch)
    text = "with --splitwise: prompts of which decode lacks fewer tokens go to decode alone (default: 0, none)"
    add("pd-min-prompt-tokens", text, default=0, **count)
    parser.add_argument("--version", "-version", "-V", help="print the version", default=False, **switch)  # type: ignore[arg-type]
    return parser


if __name__ == "__main__":
    sys.exit(main())
