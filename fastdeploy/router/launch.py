"""`fd-router` and `python -m fastdeploy.router.launch`: one endpoint in front of many servers."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence

import fastdeploy
from fastdeploy.config.flags import FlagParser
from fastdeploy.errors import ConfigError, FastDeployError
from fastdeploy.observability.logs import CONSOLE, ROOT, close_logging, setup_logging
from fastdeploy.router.config import RouterConfig, load_config, without_effect
from fastdeploy.router.placement import PairSettings
from fastdeploy.router.policies import POLICIES

PROGRAM = "python -m fastdeploy.router.launch"
COMMAND = "fd-router"
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
    )


def _start(config: RouterConfig, environ: Mapping[str, str]) -> int:
    from fastdeploy.config.resolve import log_dir
    from fastdeploy.entrypoints.openai.server import address_of, bind
    from fastdeploy.router.server import serve

    assert config.server.port is not None
    with bind(config.server.host, config.server.port, "--port") as sock:
        setup_logging(log_dir(environ), "router", config.log.output != "file", environ=_log_environ(config, environ))
        if config.log.level in _LEVELS:
            logging.getLogger(ROOT).setLevel(_LEVELS[config.log.level])
        try:
            for line in without_effect(config):
                CONSOLE_LOGGER.warning(line)
            CONSOLE_LOGGER.info("Starting server on %s, policy %s", address_of(sock), config.scheduler.policy)
            import uvloop

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                in_order = runner.run(serve(config, sock))
        finally:
            close_logging()
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
