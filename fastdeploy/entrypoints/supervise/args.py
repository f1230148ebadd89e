"""The command line of multi_api_server: its own flags, then `--args` and the flags that every server gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastdeploy.config.args import EngineArgs, Ports, ServerArgs
from fastdeploy.config.flags import Flag, FlagParser, UnknownOption, build_parser, flags_of, read_flags
from fastdeploy.entrypoints.supervise.group import GROUP_PORT
from fastdeploy.errors import ConfigError

PROGRAM = "python -m fastdeploy.entrypoints.openai.multi_api_server"
SERVERS = "Servers"
REST = "--args"
EPILOG = f"""What follows {REST}:
  The flags of api_server, the same for every server; --flag=value works too. `api_server --help` lists them.
  --port, --metrics-port, --controller-port and --local-data-parallel-id differ from server to server and are set for
  each; --data-parallel-size is the number of servers, over all machines of --ips.

What it does:
  Starts the servers, waits until all take requests and shows where they listen. A server that dies or hangs is named
  with its last lines and started again, after 1 second, then 2, 4, up to 30. The first SIGTERM or Ctrl-C lets running
  requests finish, the second ends them. Server i logs to FD_LOG_DIR/log_i, this program to multi_api_server.log.

Several machines:
  Run the same command on each, with --ips behind {REST}. FD_HOST_IP names this machine's address if that is
  not plain. With --enable-expert-parallel they meet at the first machine, at the first --engine-worker-queue-port
  ({GROUP_PORT} if left out); FD_GROUP_SECRET, alike on all, keeps others out.

Example:
  {PROGRAM} \\
    --num-servers 2 --ports 8180,8182 --metrics-ports 8181,8183 \\
    {REST} --model DIR --data-parallel-size 2 --enable-expert-parallel
  curl http://127.0.0.1:8182/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "Hello"}}'"""


@dataclass(frozen=True, kw_only=True)
class LaunchArgs:
    """Flags of the supervisor itself."""

    num_servers: Annotated[
        int, Flag(SERVERS, "Servers on this machine: its share of --data-parallel-size, one per data parallel rank.")
    ] = 2
    ports: Annotated[
        Ports,
        Flag(SERVERS, "HTTP ports, one per server; 0 takes a free one and shows it. (default: 8000, 8002, 8004, ...)"),
    ] = ()
    metrics_ports: Annotated[
        Ports,
        Flag(SERVERS, "Ports of /metrics, one per server; left out or -1, free ones are taken and shown."),
    ] = ()
    controller_ports: Annotated[
        Ports, Flag(SERVERS, "Ports of the control servers, one per server; left out or -1, there are none.")
    ] = ()
    restart: Annotated[
        Literal["on-failure", "never"],
        Flag(SERVERS, "A server that dies or hangs is started again; with never, all are stopped and the status is 1."),
    ] = "on-failure"


def parse_command_line(argv: Sequence[str]) -> tuple[LaunchArgs, tuple[str, ...]]:
    """The supervisor's flags, and what every server gets. Raises ConfigError for flags that do not exist."""
    words = list(argv)
    cut = words.index(REST) if REST in words else len(words)
    usage = f"%(prog)s [flags] {REST} --model DIR [flags of api_server]"
    parser = build_parser(PROGRAM, LaunchArgs, usage=usage, epilog=EPILOG)
    try:
        flags = parser.parse_flags(words[:cut])
    except UnknownOption as exc:
        name = str(exc).partition(":")[0]
        if name in {flag.option for cls in (ServerArgs, EngineArgs) for flag in flags_of(cls)}:
            raise ConfigError(f"{name}: a flag of the servers; write it behind {REST}") from None
        raise
    if cut == len(words):
        raise ConfigError(
            f"{REST}: missing; the flags of the servers follow it, --model and --data-parallel-size first"
        )
    return read_flags(LaunchArgs, flags), tuple(words[cut + 1 :])


def server_parser() -> FlagParser:
    """The parser that every server reads its flags with."""
    return build_parser("api_server", ServerArgs, EngineArgs)
