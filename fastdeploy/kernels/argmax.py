"""The most likely token of each row of logits, in one launch that also fills the GPU for a single row.

Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def argmax_ref(logits_sV: Tensor) -> Tensor:
    """int64 [s]: the place of each row's largest value, of equal ones the first."""
    top_s1 = logits_sV.amax(-1, keepdim=True)
    return (logits_sV == top_s1).byte().argmax(-1)


class Argmax:
    """Scratch memory for rows of up to `max_rows`; calls on one stream may share it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.n_blocks = triton.cdiv(vocab_size, _BLOCK)
        self._value_sb = torch.empty((max_rows, self.n_blocks), dtype=torch.float32, device=device)
        self._index_sb = torch.empty((max_rows, self.n_blocks), dtype=torch.int32, device=device)
        self._n_done_s = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def __call__(self, logits_sV: Tensor, into: Tensor | None = None, at_s: Tensor | None = None) -> Tensor:
        """As the reference, for contiguous rows without NaN (a row with NaN gives some valid place).

        With `into` (int64) also `into[at_s] = found`, `at_s` of an integer type.
        """
        n_rows, vocab_size = logits_sV.shape
        found_s = torch.empty(n_rows, dtype=torch.int64, device=logits_sV.device)
        if n_rows:
            _argmax_kernel[(n_rows, self.n_blocks)](
                logits_sV,
                self._value_sb,
                self._index_sb,
                self._n_done_s,
                found_s,
                found_s if into is None else into,
                found_s if at_s is None else at_s,
                vocab_size,
                logits_sV.stride(0),
                N_BLOCKS=self.n_blocks,
                BLOCKS=triton.next_power_of_2(self.n_blocks),
                BLOCK=_BLOCK,
                SCATTER=into is not None,
                num_warps=8,
            )
        return found_s


@triton.jit
def _argmax_kernel(
    logits_ptr,
    value_ptr,
    index_ptr,
    n_done_ptr,
    found_ptr,
    into_ptr,
    at_ptr,
    vocab_size,
    row_stride,
    N_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCATTER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * row_stride + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    tl.store(value_ptr + row * N_BLOCKS + block, tl.max(x, 0))
    tl.store(index_ptr + row * N_BLOCKS + block, block * BLOCK + tl.argmax(x, 0, tie_break_left=True))
    # The barrier orders every thread's stores before the count, which publishes them.
    tl.debug_barrier()
    n_before = tl.atomic_add(n_done_ptr + row, 1, sem="acq_rel", scope="gpu")
    if n_before == N_BLOCKS - 1:
        part = tl.arange(0, BLOCKS)
        inside = part < N_BLOCKS
        value = tl.load(value_ptr + row * N_BLOCKS + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
        index = tl.load(index_ptr + row * N_BLOCKS + part, mask=inside, other=2147483647, cache_modifier=".cg")
        # Of blocks with the same maximum the first holds the first place.
        first = tl.min(tl.where(value == tl.max(value, 0), index, 2147483647), 0)
        tl.store(found_ptr + row, first.to(tl.int64))
        tl.store(n_done_ptr + row, 0)
        if SCATTER:
            tl.store(into_ptr + tl.load(at_ptr + row), first.to(tl.int64))
