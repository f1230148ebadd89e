"""Copies of KV pages and their check values on a CPU, in one pass over the memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdeploy.kernels.cpu.library import CpuKernels


class _PageCopyStruct(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("from_", "to", "from_ids", "to_ids")],
        *[(name, ctypes.c_long) for name in ("n_pages", "n_heads", "n_words")],
        *[(name, ctypes.c_long) for name in ("from_page_stride", "from_values", "to_page_stride", "to_values")],
    )


def copy_pages(
    kernels: CpuKernels, from_p2hW: Tensor, from_ids: Tensor, to_p2hW: Tensor | None, to_ids: Tensor | None
) -> Tensor:
    """As `copy_pages_ref`. Holds one thread and not the interpreter lock."""
    n_heads, n_words = from_p2hW.shape[2:]
    checks_nh = torch.empty(len(from_ids), n_heads, dtype=torch.int64)
    to = to_page_stride = to_values = targets = None
    if to_p2hW is not None and to_ids is not None:
        assert len(to_ids) == len(from_ids)
        to, targets = to_p2hW.data_ptr(), to_ids.data_ptr()
        to_page_stride, to_values = to_p2hW.stride()[:2]
    call = _PageCopyStruct(
        from_p2hW.data_ptr(),
        to,
        from_ids.data_ptr(),
        targets,
        len(from_ids),
        n_heads,
        n_words,
        *from_p2hW.stride()[:2],
        to_page_stride or 0,
        to_values or 0,
    )
    kernels.copy_pages(ctypes.addressof(call), checks_nh.data_ptr())
    return checks_nh
