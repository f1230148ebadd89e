"""What to start: the command, the ports, the environment and the folder of every server of this machine.

All that is wrong with the command is reported together, before anything is started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from fastdeploy.config.args import EngineArgs, ServerArgs
from fastdeploy.config.parallel import LOOPBACK, host_index
from fastdeploy.config.resolve import Problems, log_dir, resolve_all
from fastdeploy.entrypoints.supervise.args import LaunchArgs, server_parser
from fastdeploy.entrypoints.supervise.group import group_environment, group_port
from fastdeploy.entrypoints.supervise.ports import (
    ANY,
    Wanted,
    check_distinct,
    check_free,
    default_ports,
    one_per_server,
)
from fastdeploy.errors import ConfigError

CHILD_MODULE = "fastdeploy.entrypoints.supervise.child_main"
MULTI_API_SERVER = "FD_ENABLE_MULTI_API_SERVER"
ANY_HOST = "0.0.0.0"
NONE = -1  # no control server
OF_EACH_SERVER: Mapping[str, str] = MappingProxyType(  # set by this program -> where to give it instead
    {
        "--port": "give the ports with --ports, before --args",
        "--metrics-port": "give the ports with --metrics-ports, before --args",
        "--controller-port": "give the ports with --controller-ports, before --args",
        "--local-data-parallel-id": "leave it out: each server gets its own",
    }
)
INTERNAL_PORTS = ("engine_worker_queue_port", "cache_queue_port", "pd_comm_port", "rdma_comm_ports")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One server. Its ports may be 0: it then chooses, and keeps its choice when it is started again."""

    index: int  # on this machine
    rank: int  # data parallel, over all machines
    command: tuple[str, ...]  # without ports
    port: int
    metrics_port: int
    environ: Mapping[str, str]
    log_dir: Path

    @property
    def name(self) -> str:
        """For messages."""
        return f"server {self.index}" + (f" (rank {self.rank})" if self.rank != self.index else "")

    def argv(self, port: int, metrics_port: int) -> tuple[str, ...]:
        """The command with these ports."""
        return (*self.command, "--port", str(port), "--metrics-port", str(metrics_port))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """All servers of this machine, and how they are kept."""

    servers: tuple[ServerSpec, ...]
    restarts: bool
    drain_s: float | None  # what running requests get after the first signal; None is no limit


def make_plan(launch: LaunchArgs, server_args: Sequence[str], environ: Mapping[str, str]) -> GroupPlan:
    """The plan for a command line. Raises ConfigError with one line for each thing that is wrong."""
    problems = Problems()
    problems.check(launch.num_servers >= 1, f"--num-servers {launch.num_servers}: must be at least 1")
    n_servers = max(launch.num_servers, 1)
    ports = one_per_server("--ports", launch.ports, default_ports(n_servers), problems)
    metrics_ports = one_per_server("--metrics-ports", launch.metrics_ports, (ANY,) * n_servers, problems)
    controller_ports = one_per_server(
        "--controller-ports", launch.controller_ports, (NONE,) * n_servers, problems, NONE
    )
    flags = _server_flags(server_args, problems)
    if flags is None:
        problems.raise_if_any()
    assert flags is not None  # otherwise there was a problem to raise
    server, engine = flags
    first_rank, machine = _place(launch, engine, environ, problems)
    environ = {**environ, MULTI_API_SERVER: "1"}
    own_ports = list(zip(ports, metrics_ports, controller_ports, strict=True))
    _resolve(server, engine, own_ports[0], first_rank, environ, problems)
    wanted = _wanted(server, engine, own_ports, machine)
    check_distinct(wanted, problems)
    check_free(wanted, problems)
    problems.raise_if_any()
    environ = {**environ, **group_environment(engine, environ)}
    shared = [*server_args]
    if launch.restart == "never" and server.restart == "auto":
        shared += ["--restart", "never"]  # else a server would bring its engine back by itself
    return GroupPlan(
        servers=tuple(_spec(index, first_rank, shared, own, environ) for index, own in enumerate(own_ports)),
        restarts=launch.restart == "on-failure",
        drain_s=float(server.timeout_graceful_shutdown) or None,
    )


def _spec(
    index: int, first_rank: int, shared: Sequence[str], ports: tuple[int, int, int], environ: Mapping[str, str]
) -> ServerSpec:
    port, metrics_port, controller_port = ports
    rank = first_rank + index
    folder = Path(log_dir(environ)) / f"log_{index}"
    command = [sys.executable, "-m", CHILD_MODULE, *shared, "--local-data-parallel-id", str(rank)]
    if controller_port >= 0:
        command += ["--controller-port", str(controller_port)]
    return ServerSpec(
        index=index,
        rank=rank,
        command=tuple(command),
        port=port,
        metrics_port=metrics_port,
        environ={**environ, "FD_LOG_DIR": os.fspath(folder)},
        log_dir=folder,
    )


def _server_flags(server_args: Sequence[str], problems: Problems) -> tuple[ServerArgs, EngineArgs] | None:
    """The flags behind --args as every server will read them; None when that cannot be."""
    given = {word.partition("=")[0].replace("_", "-") for word in server_args if word.startswith("--")}
    for flag, instead in OF_EACH_SERVER.items():
        problems.check(flag not in given, f"{flag} behind --args: it differs from server to server; {instead}")
    try:
        namespace = server_parser().parse_flags(server_args)
        return ServerArgs.from_namespace(namespace), EngineArgs.from_namespace(namespace)
    except ConfigError as exc:
        problems.lines.append(f"behind --args: {exc}")
        return None


def _place(launch: LaunchArgs, engine: EngineArgs, environ: Mapping[str, str], problems: Problems) -> tuple[int, int]:
    """(first data parallel rank, number) of this machine."""
    n_machines, n_data = max(len(engine.ips), 1), engine.data_parallel_size
    if n_data < 1 or n_data % n_machines:
        return 0, 0  # `resolve` has the words for it
    share = n_data // n_machines
    of_machines = f" over {n_machines} machines (--ips)" if n_machines > 1 else ""
    problems.check(
        launch.num_servers == share,
        f"--num-servers {launch.num_servers}: --data-parallel-size {n_data}{of_machines} needs {share} here, "
        "one server per data parallel rank",
    )
    try:
        machine = host_index(engine.ips or (LOOPBACK,), environ)
    except ConfigError:
        return 0, 0  # and for this
    return machine * share, machine


def _resolve(
    server: ServerArgs,
    engine: EngineArgs,
    ports: tuple[int, int, int],
    first_rank: int,
    environ: Mapping[str, str],
    problems: Problems,
) -> None:
    """What the first server would find wrong; the others would find the same."""
    port, metrics_port, controller_port = ports
    server = replace(server, port=port, metrics_port=metrics_port, controller_port=controller_port)
    try:
        resolve_all(server, replace(engine, local_data_parallel_id=first_rank), environ)
    except ConfigError as exc:
        problems.lines.append(str(exc))


def _wanted(
    server: ServerArgs, engine: EngineArgs, own_ports: Sequence[tuple[int, int, int]], machine: int
) -> list[Wanted]:
    """Every port of this machine that the command names."""
    found = []
    for port, metrics_port, controller_port in own_ports:
        found.append(Wanted("--ports", port, server.host))
        if metrics_port != port:
            found.append(Wanted("--metrics-ports", metrics_port, server.host))
        if controller_port >= 0:
            found.append(Wanted("--controller-ports", controller_port, server.host))
    host = engine.ips[machine] if engine.ips else ANY_HOST
    for name in INTERNAL_PORTS:
        found += [Wanted("--" + name.replace("_", "-"), port, host) for port in getattr(engine, name) if port > 0]
    if machine == 0 and group_port(engine) is not None and not engine.engine_worker_queue_port:
        found.append(Wanted("--engine-worker-queue-port (left out)", group_port(engine) or ANY, host))
    return found
