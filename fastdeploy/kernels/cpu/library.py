"""The compiled kernels of this folder: built at first use, kept in the cache folder, bound to torch's OpenMP runtime.

The C files are compiled once for an instruction set, with the system's C compiler. Functions take raw pointers and let
go of the interpreter lock. Their threads are those of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch

from fastdeploy.config.cache_folder import default_cache_dir

log = logging.getLogger("fastdeploy.kernels")

PANEL = 16  # outputs side by side in a panel of weights, as in vectors.h
WEIGHT_TYPES: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 0, torch.float16: 1, torch.bfloat16: 2})

# By what torch calls the instruction set of this machine, the best first.
_ISA_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    }
)
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror=implicit-function-declaration")
_COMPILE_TIMEOUT_S = 120.0


class KernelsUnavailableError(Exception):
    """Why there are no compiled kernels here; one line."""


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """The functions of the C files, which describe their arguments; pointers are addresses.

    `linear` and `ffn` return 0, or 1 when there is no memory for their scratch space.
    """

    isa: str
    linear: Callable[[int, int, int | None, int, int], int]  # struct linear, x, bias, y, n_rows
    ffn: Callable[[int, int, int, int, int | None, int | None, int], int]  # struct ffn, x, y, n, experts, weights, k
    decode: Callable[[int, int, int, int, int], None]  # struct batch, qkv, rotation, pages, out
    store: Callable[[int, int, int, int, int, int], None]  # struct shape, qkv, rotation, pages, slots, n_rows
    choose_experts: Callable[[int, int, int, int, int], None]  # struct gate, logits, experts, weights, n_rows
    # x, residual, weight, sum, y, n_rows, n, eps
    rms_norm: Callable[[int, int | None, int, int | None, int, int, int, float], None]
    copy_pages: Callable[[int, int], None]  # struct page_copy, checks


@lru_cache(maxsize=1)
def cpu_kernels() -> CpuKernels | None:
    """The kernels for this machine's best instruction set; None, said once in the log, when there can be none."""
    try:
        supported = supported_isas()
        if not supported:
            raise KernelsUnavailableError(f"they need AVX2, this machine has {torch.backends.cpu.get_cpu_capability()}")
        return load_kernels(supported[0])
    except KernelsUnavailableError as error:
        log.warning("no compiled CPU kernels, steps of few tokens are slower: %s", error)
        return None


def kernels_for(device: torch.device, dtype: torch.dtype) -> CpuKernels | None:
    """The kernels where layers compute in `dtype` on `device`; None where torch does it."""
    return cpu_kernels() if device.type == "cpu" and dtype == torch.float32 else None


def supported_isas() -> list[str]:
    """The instruction sets of this machine that there are kernels for, the best first."""
    isas = list(_ISA_FLAGS)
    best = torch.backends.cpu.get_cpu_capability()
    return isas[isas.index(best) :] if best in isas else []


def load_kernels(isa: str, folder: Path | None = None) -> CpuKernels:
    """The kernels for `isa` from `folder` (default: the cache folder), compiled when they are not there.

    Raises KernelsUnavailableError.
    """
    path = _compiled(isa, folder or default_cache_dir() / "kernels")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailableError(f"{path} cannot be loaded, delete it: {error}") from error
    fork_join, n_threads = _openmp_of_torch()
    library.fd_set_runtime.argtypes = [ctypes.c_void_p] * 2
    library.fd_set_runtime(fork_join, n_threads)
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.fd_linear.argtypes = [pointer, pointer, pointer, pointer, number]
    library.fd_ffn.argtypes = [pointer, pointer, pointer, number, pointer, pointer, number]
    library.fd_decode.argtypes = [pointer] * 5
    library.fd_decode.restype = None
    library.fd_store.argtypes = [*[pointer] * 5, number]
    library.fd_store.restype = None
    library.fd_choose_experts.argtypes = [pointer, pointer, pointer, pointer, number]
    library.fd_choose_experts.restype = None
    library.fd_rms_norm.argtypes = [*[pointer] * 5, number, number, ctypes.c_float]
    library.fd_rms_norm.restype = None
    library.fd_copy_pages.argtypes = [pointer, pointer]
    library.fd_copy_pages.restype = None
    return CpuKernels(
        isa=isa,
        linear=library.fd_linear,
        ffn=library.fd_ffn,
        decode=library.fd_decode,
        store=library.fd_store,
        choose_experts=library.fd_choose_experts,
        rms_norm=library.fd_rms_norm,
        copy_pages=library.fd_copy_pages,
    )


def _compiled(isa: str, folder: Path) -> Path:
    """The shared library for `isa`; its name tells sources and flags."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.c"), *here.glob("*.h")])
    flags = (*_FLAGS, *_ISA_FLAGS[isa])
    digest = hashlib.sha256("\n".join(flags).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    path = folder / f"cpu-{isa.lower()}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        _compile([str(file) for file in files if file.suffix == ".c"], flags, path)
    return path


def _compile(sources: list[str], flags: tuple[str, ...], path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise KernelsUnavailableError("they need a C compiler; install gcc")
    started = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may compile at the same time: each renames a finished file of its own.
        with tempfile.TemporaryDirectory(prefix=".compile-", dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *flags, *sources, "-lm", "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            if done.returncode != 0:
                said = (done.stderr.strip() or "nothing").splitlines()[0]
                raise KernelsUnavailableError(f"{compiler} failed: {said}")
            built.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"they cannot be compiled into {path.parent}: {error}") from error
    log.info("CPU kernels compiled in %.1f s: %s", time.monotonic() - started, path)


def _openmp_of_torch() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_max_threads in the runtime that torch uses.

    Intel's and LLVM's runtimes have GOMP_parallel as well.
    """
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    paths = {fields[5] for fields in lines if len(fields) == 6}
    for path in sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))):
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            names = (runtime.GOMP_parallel, runtime.omp_get_max_threads)
            return tuple(ctypes.cast(name, ctypes.c_void_p).value for name in names)  # type: ignore[return-value]
    raise KernelsUnavailableError("torch has loaded no OpenMP runtime")
