"""Memory of a rank's process beside what it allocates for the model: what it takes bare, and what it has freed.

    python -m fastdeploy.executor.process_memory

prints the bytes that a rank on a CPU takes before it has a model.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from fastdeploy.config.hardware import cpu_rank_environment
from fastdeploy.errors import EngineStartError

_TIMEOUT_S = 120.0

log = logging.getLogger("fastdeploy.rank")


def private_bytes(pid: int) -> int:
    """Memory that is the process's own and backed by no file: what it has allocated and touched."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no field Anonymous")


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can.

    glibc keeps what lies below a block still in use. After loading that is as much as several layers' weights, once for
    each rank, and nothing would ever use it again.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def bare_rank_bytes() -> int:
    """Private memory of a rank's process on this machine's CPU before it has a model: started, measured, ended.

    Raises EngineStartError when it cannot be started.
    """
    command = [sys.executable, "-m", "fastdeploy.executor.process_memory"]
    environ = {**os.environ, **cpu_rank_environment(os.environ)}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise EngineStartError(f"a bare rank's memory cannot be measured: {error}") from error


def _become_a_bare_rank() -> None:
    import torch

    from fastdeploy.kernels.cpu.library import cpu_kernels

    for module in ("distributed.all_to_all.shm", "executor.worker", "runner.build"):
        import_module(f"fastdeploy.{module}")
    cpu_kernels()
    torch.zeros(1).add_(1)


if __name__ == "__main__":
    _become_a_bare_rank()
    return_freed_memory()
    print(private_bytes(os.getpid()))
