"""Which protocol two ranks use, out of what `--cache-transfer-protocol` allows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastdeploy.errors import ConfigError, TransferUnavailable
from fastdeploy.transfer.base import Endpoint

log = logging.getLogger("fastdeploy.transfer")

PROTOCOLS = ("ipc", "rdma")


def parse_protocols(flag: str) -> tuple[str, ...]:
    """`--cache-transfer-protocol`: names of PROTOCOLS with commas. Raises ConfigError."""
    names = tuple(name.strip() for name in flag.split(",") if name.strip())
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise ConfigError(f"--cache-transfer-protocol {flag!r}: must be {' or '.join(PROTOCOLS)}, or both with a comma")
    return names


def offered_names(protocols: Sequence[str], device: str, nixl_usable: bool) -> list[str]:
    """The transports that a rank on `device` ("cpu" or "cuda") offers, for what the flag allows.

    nixl_usable: the package is installed, and there is an RDMA device or pages that only it can send.
    """
    names = []
    if "ipc" in protocols:
        names.append("cuda_ipc" if device == "cuda" else "shm")
    if "rdma" in protocols:
        if device == "cuda" or nixl_usable:
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
