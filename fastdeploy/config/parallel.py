"""Group sizes, machines, and which replicas this process serves."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.hardware import n_usable_cpus
from fastdeploy.config.schema import ModelShape, ParallelConfig
from fastdeploy.errors import ConfigError

LOOPBACK = "127.0.0.1"


def one_of_many(environ: Mapping[str, str]) -> bool:
    """Whether this server is one of those that `multi_api_server` starts, each with one replica."""
    return environ.get("FD_ENABLE_MULTI_API_SERVER", "0") not in ("", "0")


def resolve_parallel(args: EngineArgs, environ: Mapping[str, str]) -> ParallelConfig:
    """What the flags say, with sizes that may still contradict the model. Raises ConfigError for what makes no group.

    A server takes all replicas of its machine, or only that of `--local-data-parallel-id` if it is one of many or was
    given one.
    """
    hosts = args.ips or (LOOPBACK,)
    sizes = ParallelConfig(
        tensor=args.tensor_parallel_size, data=args.data_parallel_size, expert=args.enable_expert_parallel, hosts=hosts
    )
    n_local = sizes.data // len(hosts)
    if sizes.data < 1 or sizes.data % len(hosts):
        return sizes  # what is wrong with that, the check against the model says
    rank, first = args.local_data_parallel_id, n_local * host_index(hosts, environ)
    if rank > 0 or one_of_many(environ):
        if not first <= rank < first + n_local:
            raise ConfigError(
                f"--local-data-parallel-id {rank}: this machine has the ranks {first}..{first + n_local - 1} of "
                f"--data-parallel-size {sizes.data}"
            )
        return replace(sizes, data_rank=rank, serves=(rank,))
    return replace(sizes, data_rank=first, serves=tuple(range(first, first + n_local)))


def contradictions(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    """What about these sizes cannot work with this model, one line each."""
    from fastdeploy.distributed import topology

    if parallel.n_ranks == 1:  # there is nothing to spread; the flag may stay in a command that is tried on one rank
        parallel = replace(parallel, expert=False)
    return topology.contradictions(parallel, shape)


def missing_devices(parallel: ParallelConfig, n_there: int) -> list[str]:
    """One line when this machine has fewer GPUs than ranks."""
    n_wanted = parallel.n_ranks // len(parallel.hosts)
    if n_there >= n_wanted:
        return []
    return [
        f"--tensor-parallel-size {parallel.tensor} x --data-parallel-size {parallel.data}: {n_wanted} GPUs are needed "
        f"on this machine, {n_there} are visible (CUDA_VISIBLE_DEVICES)"
    ]


def served_devices(parallel: ParallelConfig, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of the replicas that are served here, as CUDA_VISIBLE_DEVICES names them, or else by their numbers."""
    first = [rank % parallel.n_local_replicas * parallel.tensor for rank in parallel.serves]
    indices = [start + tensor_rank for start in first for tensor_rank in range(parallel.tensor)]
    names = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(names[index] if index < len(names) else str(index) for index in indices)


def host_index(hosts: Sequence[str], environ: Mapping[str, str]) -> int:
    """Which of the machines this is: FD_HOST_IP, or the one whose address can be bound here. Raises ConfigError."""
    if len(hosts) == 1:
        return 0
    named = environ.get("FD_HOST_IP", "").strip()
    if named:
        if named not in hosts:
            raise ConfigError(f"FD_HOST_IP {named}: is not among --ips {','.join(hosts)}")
        return hosts.index(named)
    ours = [i for i, host in enumerate(hosts) if is_local(host)]
    if len(ours) != 1:
        what = "none of them is" if not ours else f"{', '.join(hosts[i] for i in ours)} all are"
        raise ConfigError(
            f"--ips {','.join(hosts)}: {what} an address of this machine; set FD_HOST_IP to the one that is"
        )
    return ours[0]


def n_threads_per_rank(parallel: ParallelConfig) -> int | None:
    """CPU threads of each rank where several share this machine's cores; None leaves the choice to torch."""
    n_ranks = parallel.n_ranks // len(parallel.hosts)
    return max(n_usable_cpus() // n_ranks, 1) if n_ranks > 1 else None


def is_local(host: str) -> bool:
    """Whether that is an address of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
