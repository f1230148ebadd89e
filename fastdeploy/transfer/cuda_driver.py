"""The few calls of the CUDA driver that share memory between processes, by ctypes: torch has them only with files in
/dev/shm that outlive a kill.

They work on the context that is current on the calling thread, which torch makes current with `torch.cuda.device`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from fastdeploy.errors import TransferUnavailable

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class CudaError(Exception):
    """A call failed; the text has its name and the driver's reason."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


def share(pointer: int) -> tuple[bytes, int]:
    """(handle of the allocation that a device pointer lies in, the pointer's offset there). Raises CudaError."""
    driver, base, handle = _driver(), ctypes.c_uint64(), _Handle()
    _call(driver, "cuMemGetAddressRange_v2", ctypes.byref(base), None, ctypes.c_uint64(pointer))
    _call(driver, "cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle), pointer - base.value


def open_shared(handle: bytes) -> int:
    """Pointer to the start of another process's allocation, valid on the current device. Raises CudaError."""
    pointer = ctypes.c_uint64()
    arguments = (ctypes.byref(pointer), _Handle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS))
    _call(_driver(), "cuIpcOpenMemHandle_v2", *arguments)
    return pointer.value


def close_shared(pointer: int) -> None:
    """Give up what `open_shared` returned. Raises CudaError."""
    _call(_driver(), "cuIpcCloseMemHandle", ctypes.c_uint64(pointer))


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferUnavailable(f"cuda_ipc: the CUDA driver cannot be loaded: {error}") from error


def _call(driver: Any, name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")
