"""The KV pages of a rank as one piece of memory, which peers may read, and the copies into it with their check values.

On a CPU the memory can be a segment without a name (memfd): the kernel frees it with the last process that has it, so
nothing is left after a kill. Only processes of the same user can open it, through /proc. Its first bytes tell whose it
is, so that nobody reads the memory of a process that got the same process number later.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastdeploy.kernels.cpu.library import cpu_kernels
from fastdeploy.kernels.cpu.pages import copy_pages as copy_pages_in_c
from fastdeploy.kernels.page_copy_ref import copy_pages_ref
from fastdeploy.transfer.layout import WORD_BYTES, PageLayout

HEADER_BYTES = 4096
_MAGIC = b"fdpages1"
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4  # fcntl.h; Python 3.11 names only some


class SegmentHeader(msgspec.Struct, frozen=True, array_like=True):
    """First bytes of a shared segment, after a magic number and their length."""

    owner: str
    layout: PageLayout


@dataclass(frozen=True, slots=True)
class PageMemory:
    """`pages`: uint8 [n_layers, n_pages, page_bytes], contiguous; `segment`: descriptor of its memfd, if any."""

    layout: PageLayout
    pages: Tensor
    segment: int | None = None

    def layer(self, layer: int) -> Tensor:
        """Pages of one layer in their dtype, [n_pages, 2 (keys, values), kv head, token, head_dim]; a view."""
        cut = self.layout
        dtype: torch.dtype = getattr(torch, cut.dtype)
        return self.pages[layer].view(dtype).view(cut.n_pages, 2, cut.n_kv_heads, cut.page_tokens, cut.head_dim)

    def heads(self, layer: int, first: int = 0, n_heads: int | None = None) -> Tensor:
        """A run of heads in all pages of one layer as words: int64 [n_pages, 2, n_heads, W]; a view."""
        words = words_of(self.pages[layer], self.layout)
        return words[:, :, first:] if n_heads is None else words[:, :, first : first + n_heads]

    def checks(self, page_ids: Sequence[int], first_layer: int, n_layers: int) -> bytes:
        """Check values of these pages as they are now, uint64 [n_layers, n_pages, n_kv_heads] as `PageSet` wants them.

        On a GPU it waits for the device: call it when the layers are known to be computed.
        """
        if not page_ids:
            return b""
        ids = torch.tensor(page_ids, dtype=torch.int64, device=self.pages.device)
        layers = range(first_layer, first_layer + n_layers)
        found = torch.stack([copy_pages(self.heads(layer), ids, None, None) for layer in layers])
        return found.cpu().numpy().astype("<i8", copy=False).tobytes()

    def close(self) -> None:
        """Give the segment up; memory that is mapped stays until nobody uses it."""
        if self.segment is not None:
            os.close(self.segment)


def allocate_pages(layout: PageLayout, device: torch.device, owner: str, *, shared: bool) -> PageMemory:
    """Zeroed pages on `device`; on a CPU in a segment that peers of the same machine can map, when `shared`.

    A CPU's memory costs nothing until a page is first touched. Raises OSError or torch.OutOfMemoryError.
    """
    shape = (layout.n_layers, layout.n_pages, layout.page_bytes)
    if device.type != "cpu":
        return PageMemory(layout, torch.zeros(shape, dtype=torch.uint8, device=device))
    if not shared:
        return PageMemory(layout, torch.from_numpy(np.zeros(shape, np.uint8)))
    segment = os.memfd_create("fastdeploy-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(segment, HEADER_BYTES + layout.total_bytes)
        # A peer that has mapped the segment must not be hit by its shrinking.
        fcntl.fcntl(segment, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        mapping = mmap.mmap(segment, HEADER_BYTES + layout.total_bytes)
    except OSError:
        os.close(segment)
        raise
    header = msgspec.msgpack.encode(SegmentHeader(owner, layout))
    mapping[: len(_MAGIC) + 4 + len(header)] = _MAGIC + len(header).to_bytes(4, "little") + header
    pages = torch.from_numpy(np.frombuffer(mapping, np.uint8, offset=HEADER_BYTES).reshape(shape))
    return PageMemory(layout, pages, segment)


def read_header(start: bytes) -> SegmentHeader:
    """The header out of the first HEADER_BYTES of a segment. Raises ValueError when it is none."""
    at = len(_MAGIC)
    if start[:at] != _MAGIC:
        raise ValueError("it does not start like a segment of KV pages")
    n_bytes = int.from_bytes(start[at : at + 4], "little")
    try:
        return msgspec.msgpack.decode(start[at + 4 : at + 4 + n_bytes], type=SegmentHeader)
    except msgspec.DecodeError as error:
        raise ValueError(f"its header cannot be read: {error}") from error


def words_of(layer_pB: Tensor, layout: PageLayout) -> Tensor:
    """Pages of one layer, uint8 [n_pages, page_bytes], as int64 [n_pages, 2, n_kv_heads, W]; a view."""
    n_words = layout.block_bytes // WORD_BYTES
    return layer_pB.view(torch.int64).view(-1, 2, layout.n_kv_heads, n_words)


def copy_pages(from_p2hW: Tensor, from_ids: Tensor, to_p2hW: Tensor | None, to_ids: Tensor | None) -> Tensor:
    """What `copy_pages_ref` describes, by the fastest kernel of the device; ids lie on the device too."""
    if from_p2hW.device.type == "cuda":
        from fastdeploy.kernels.page_copy import copy_pages as copy_pages_in_triton  # only where Triton is

        return copy_pages_in_triton(from_p2hW, from_ids, to_p2hW, to_ids)
    kernels = cpu_kernels()
    if kernels is None:
        return copy_pages_ref(from_p2hW, from_ids, to_p2hW, to_ids)
    return copy_pages_in_c(kernels, from_p2hW, from_ids, to_p2hW, to_ids)
