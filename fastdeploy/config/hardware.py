"""What this machine offers, found without torch: CUDA devices through the driver library, and CPUs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One GPU as the driver describes it; `capability` is (9, 0) for Hopper."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


def cuda_devices() -> tuple[CudaDevice, ...]:
    """The GPUs this process may use (CUDA_VISIBLE_DEVICES counts); empty without a driver. No CUDA context is made."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    n_devices = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(n_devices)) != 0:
        return ()
    found = (_device(driver, index) for index in range(n_devices.value))
    return tuple(device for device in found if device is not None)


def _device(driver: ctypes.CDLL, index: int) -> CudaDevice | None:
    """The GPU at `index`, None when the driver cannot describe it."""
    handle, memory_bytes = ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    status = (
        driver.cuDeviceGet(ctypes.byref(handle), index),
        driver.cuDeviceGetName(name, len(name), handle),
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory_bytes), handle),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle),
    )
    if any(status):
        return None
    return CudaDevice(name.value.decode(errors="replace"), memory_bytes.value, (major.value, minor.value))


def n_usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for a rank that computes on a CPU, less those that the user has set.

    Waiting OpenMP threads spin for a moment and then sleep: the default spins so long that a rank which shares its
    cores with anything else slows down many times; sleeping at once costs speed on cores of its own. Weights in huge
    pages spare address translations where reading weights is all that a step does. Blocks of a few MiB go back to the
    system when they are freed: glibc would come to keep those of up to 32 MiB, and a rank held twice the memory that a
    long prefill needs, for ever (155 instead of 73 MiB for 2048 tokens of 1024 float32). Prefill was as fast, and the
    small blocks of decode steps stay.
    """
    tunables = {"hugetlb": 1, "mmap_threshold": 4 << 20, "trim_threshold": 64 << 20}
    wanted = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items())}
    if "OMP_WAIT_POLICY" not in environ:
        wanted["GOMP_SPINCOUNT"] = "10000"
    return {name: value for name, value in wanted.items() if name not in environ}
