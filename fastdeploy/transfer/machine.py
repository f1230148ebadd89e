"""What two processes share: the same machine, and the network devices it has."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path


def machine_id() -> str:
    """Equal for two processes that share kernel, process table and network, as memory of the same machine needs.

    Containers of one host have the same boot but other namespaces: for them it differs.
    """
    parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), socket.gethostname()]
    parts += [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("pid", "net")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def rdma_devices(sysfs: Path = Path("/sys")) -> list[str]:
    """Names of this machine's RDMA devices with a port that is up."""
    found = []
    for device in sorted(sysfs.glob("class/infiniband/*")):
        states = [state.read_text() for state in device.glob("ports/*/state")]
        if any("ACTIVE" in state for state in states):
            found.append(device.name)
    return found
