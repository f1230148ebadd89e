"""The part of a server in prefill/decode disaggregation, and the ports that it names for other servers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.parallel import LOOPBACK, host_index
from fastdeploy.config.schema import TransferConfig
from fastdeploy.errors import ConfigError
from fastdeploy.transfer.choose import parse_protocols

WAIT_LIMIT = "FD_PREFILL_WAIT_DECODE_RESOURCE_SECONDS"

_logger = logging.getLogger(__name__)


def resolve_transfer(args: EngineArgs, environ: Mapping[str, str], problems: list[str]) -> TransferConfig:
    """What the flags say; what is wrong is added to `problems`, one line each.

    A mixed server needs none of the ports. A prefill or decode server takes one port per owner, more (as many per owner
    for each; the first are used), or a single one, from which its ranks count upwards.
    """
    n_hosts = max(len(args.ips), 1)
    n_data = max(args.data_parallel_size // n_hosts, 1)
    n_devices = max(args.tensor_parallel_size * args.data_parallel_size // n_hosts, 1)
    paired = args.splitwise_role != "mixed"
    wanted = {
        "engine_worker_queue_port": (n_data, "data parallel rank"),
        "cache_queue_port": (n_data, "data parallel rank"),
        "pd_comm_port": (n_data, "data parallel rank"),
        "rdma_comm_ports": (n_devices, "device"),
    }
    ports = {name: _ports(args, name, *expected, paired, problems) for name, expected in wanted.items()}
    if args.innode_prefill_ports and args.splitwise_role != "decode":
        problems.append("--innode-prefill-ports: only a server with --splitwise-role decode has prefill servers")
    elif args.innode_prefill_ports:
        _logger.info("--innode-prefill-ports is not needed: each request says which prefill server has it")
    if paired and args.router is None and args.scheduler_name != "splitwise":
        _logger.warning(
            "--splitwise-role %s: nobody pairs requests; give --router, or --scheduler-name splitwise",
            args.splitwise_role,
        )
    try:
        protocols = parse_protocols(args.cache_transfer_protocol)
    except ConfigError as error:
        problems.append(str(error))
        return TransferConfig()
    return TransferConfig(
        role=args.splitwise_role,
        protocols=protocols,
        host=_host(args, environ) or LOOPBACK,
        control_ports=ports["pd_comm_port"] if paired else (),
        rank_ports=ports["rdma_comm_ports"] if paired else (),
        wait_limit_s=_wait_limit_s(environ, problems),
    )


def _host(args: EngineArgs, environ: Mapping[str, str]) -> str:
    if not args.ips:
        return environ.get("FD_HOST_IP", "").strip()
    try:
        return args.ips[host_index(args.ips, environ)]
    except ConfigError:
        return ""  # `resolve_parallel` says what is wrong


def _ports(
    args: EngineArgs, name: str, n_expected: int, owner: str, paired: bool, problems: list[str]
) -> tuple[int, ...]:
    option, ports = "--" + name.replace("_", "-"), tuple(getattr(args, name))
    if not ports:
        return ()
    shown = ",".join(map(str, ports))
    used = _used(ports, n_expected, paired)
    if used is None:
        problems.append(f"{option} {shown}: {len(ports)} ports given, {n_expected} expected (one per {owner})")
    if not all(1 <= port <= 65535 for port in used or ports):
        problems.append(f"{option} {shown}: every port must be in 1..65535")
    elif used is not None and (not paired or name in ("engine_worker_queue_port", "cache_queue_port")):
        _logger.info("%s %s is not needed: the processes of a server talk over private channels", option, shown)
    elif used is not None and used != ports:
        _logger.info("%s %s: used are %s", option, shown, ",".join(map(str, used)))
    return used or ()


def _used(ports: Sequence[int], n_expected: int, paired: bool) -> tuple[int, ...] | None:
    if len(ports) == n_expected:
        return tuple(ports)
    if paired and len(ports) == 1:
        return tuple(range(ports[0], ports[0] + n_expected))
    if paired and len(ports) % n_expected == 0:
        return tuple(ports[:n_expected])
    return None


def _wait_limit_s(environ: Mapping[str, str], problems: list[str]) -> float:
    text = environ.get(WAIT_LIMIT) or "30"
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if limit_s <= 0:
        problems.append(f"{WAIT_LIMIT} {text}: must be a number of seconds above 0")
    return limit_s
