"""Attention of sequences with one new token each over float32 pages, and storing into pages, by the C kernels."""

from __future__ import annotations

import ctypes
import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.kernels.cpu.library import PANEL, CpuKernels

_MAX_GROUP_FLOATS, _MAX_GROUP = 4096, 512  # as in attention.c


class _ShapeStruct(ctypes.Structure):
    _fields_ = (
        ("n_heads", ctypes.c_long),
        ("n_kv_heads", ctypes.c_long),
        ("head_dim", ctypes.c_long),
        ("page_tokens", ctypes.c_long),
        ("scale", ctypes.c_float),
    )


class _BatchStruct(ctypes.Structure):
    _fields_ = (
        ("shape", ctypes.c_void_p),
        ("n_sequences", ctypes.c_long),
        ("table_stride", ctypes.c_long),
        ("page_table", ctypes.c_void_p),
        ("n_context", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    )


class DecodeBatch:
    """The sequences of one step; keeps the arrays alive that the kernel reads in every layer."""

    def __init__(
        self,
        shape: _ShapeStruct,
        page_table_sp: NDArray[np.int32],
        n_context_s: NDArray[np.int32],
        row_s: NDArray[np.int64],
    ) -> None:
        self._kept = (
            shape,
            np.ascontiguousarray(page_table_sp, np.int32),
            np.ascontiguousarray(n_context_s, np.int32),
            np.ascontiguousarray(row_s, np.int64),
        )
        _, table, context, rows = self._kept
        pointers = (array.ctypes.data for array in (table, context, rows))
        self._struct = _BatchStruct(ctypes.addressof(shape), len(rows), table.shape[1], *pointers)
        self.address = ctypes.addressof(self._struct)


class PagedKernels:
    """Rotates new queries and keys, stores keys and values, attends; pages as in `layers/attention/torch_ref.py`."""

    def __init__(self, kernels: CpuKernels, n_heads: int, n_kv_heads: int, head_dim: int, page_tokens: int) -> None:
        self._decode = kernels.decode
        self._store = kernels.store
        self._shape = _ShapeStruct(n_heads, n_kv_heads, head_dim, page_tokens, 1 / math.sqrt(head_dim))

    @staticmethod
    def supports(n_heads: int, n_kv_heads: int, head_dim: int) -> bool:
        """Whether the kernel can do these heads."""
        group = n_heads // n_kv_heads
        return head_dim % PANEL == 0 and group <= _MAX_GROUP and group * head_dim <= _MAX_GROUP_FLOATS

    def prepare(
        self, page_table_sp: NDArray[np.int32], n_context_s: NDArray[np.int32], row_s: NDArray[np.int64]
    ) -> DecodeBatch:
        """Sequences by their pages, their tokens with the new one, and the row of that among the step's tokens."""
        return DecodeBatch(self._shape, page_table_sp, n_context_s, row_s)

    def decode(self, batch: DecodeBatch, qkv_thd: Tensor, rotation_td: Tensor, pages: Tensor, out_tX: Tensor) -> None:
        """Fill the batch's rows of `out_tX` [t, heads * D] from their rows of `qkv_thd` [t, heads + 2 kv heads, D].

        All float32 and contiguous, `rotation_td` complex64 [t, D/2].
        """
        assert qkv_thd.is_contiguous() and rotation_td.is_contiguous()
        self._decode(batch.address, qkv_thd.data_ptr(), rotation_td.data_ptr(), pages.data_ptr(), out_tX.data_ptr())

    def store_(self, qkv_thd: Tensor, rotation_td: Tensor, pages: Tensor, slot_t: Tensor) -> None:
        """Rotate the queries of `qkv_thd` in place; rotated keys, and values, go to places `slot_t` (int64) of `pages`.

        What `decode` says of the tensors holds here.
        """
        assert qkv_thd.is_contiguous() and rotation_td.is_contiguous()
        shape, qkv, rotation = ctypes.addressof(self._shape), qkv_thd.data_ptr(), rotation_td.data_ptr()
        self._store(shape, qkv, rotation, pages.data_ptr(), slot_t.data_ptr(), qkv_thd.shape[0])
