"""Which protocol two ranks use, out of what `--cache-transfer-protocol` allows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from fastdeploy.errors import ConfigError, TransferUnavailable
from fastdeploy.transfer.base import Endpoint
from fastdeploy.transfer.machine import rdma_devices

log = logging.getLogger("fastdeploy.transfer")

PROTOCOLS = ("ipc", "rdma")


def parse_protocols(flag: str) -> tuple[str, ...]:
    """`--cache-transfer-protocol`: names of PROTOCOLS with commas. Raises ConfigError."""
    names = tuple(name.strip() for name in flag.split(",") if name.strip())
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise ConfigError(f"--cache-transfer-protocol {flag!r}: must be {' or '.join(PROTOCOLS)}, or both with a comma")
    return names


def nixl_usable(device: str) -> bool:
    """Whether NIXL is to be used: it is installed, and RDMA is there or pages lie on a GPU. Says once what is missing.

    Call it where `rdma` is allowed. Without it a CPU's pages travel over TCP.
    """
    devices, installed = rdma_devices(), find_spec("nixl") is not None
    if device == "cuda":
        return installed
    if not devices:
        log.warning("no RDMA device that is up on this machine: KV pages to other machines travel over TCP, slower")
    elif not installed:
        log.warning(
            "RDMA devices %s are there, but nixl is not installed: KV pages travel over TCP, slower; "
            "pip install 'fastdeploy[pd]'",
            ", ".join(devices),
        )
    return bool(devices) and installed


def offered_names(protocols: Sequence[str], device: str, has_nixl: bool) -> list[str]:
    """The transports that a rank on `device` ("cpu" or "cuda") offers, for what the flag allows.

    has_nixl: what `nixl_usable` says.
    """
    names = []
    if "ipc" in protocols:
        names.append("shm" if device == "cpu" else "cuda_ipc")
    if "rdma" in protocols:
        if has_nixl:
            names.append("nixl")
        if device == "cpu":
            names.append("tcp")
    return names


def choose(protocols: Sequence[str], me: Endpoint, peer: Endpoint) -> str:
    """The transport for reading from `peer`: memory of the same machine first, then RDMA, then TCP.

    Raises TransferUnavailable, which says what each side offers and which flag would help.
    """
    both = [name for name in me.transports if name in peer.transports]
    same_machine = me.machine == peer.machine
    order = (["shm", "cuda_ipc"] if same_machine and "ipc" in protocols else []) + (
        ["nixl", "tcp"] if "rdma" in protocols else []
    )
    for name in order:
        if name in both:
            return name
    where = "on the same machine" if same_machine else "on another machine"
    hint = "" if "rdma" in protocols else "; add rdma to --cache-transfer-protocol, which is TCP where RDMA is missing"
    raise TransferUnavailable(
        f"no protocol to read KV pages from {peer.host} ({where}): --cache-transfer-protocol allows "
        f"{','.join(protocols)}, this rank offers {', '.join(me.transports) or 'none'}, the peer "
        f"{', '.join(peer.transports) or 'none'}{hint}"
    )
