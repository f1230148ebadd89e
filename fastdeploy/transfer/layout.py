"""How a rank's KV pages are cut, and which heads of which ranks hold what another rank needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from fastdeploy.errors import LayoutMismatch

WORD_BYTES = 8  # check values count in such words
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MUST_BE_EQUAL = ("n_layers", "page_tokens", "head_dim", "dtype", "total_kv_heads")


class PageLayout(msgspec.Struct, frozen=True, array_like=True):
    """Pages of one rank, in memory [layer, page, 2 (keys, values), kv head, token, head_dim].

    Of the model's `total_kv_heads` this rank holds `n_kv_heads` from `first_kv_head` on. dtype: as torch calls it.
    """

    n_layers: int
    n_pages: int
    page_tokens: int
    n_kv_heads: int
    head_dim: int
    dtype: str
    first_kv_head: int
    total_kv_heads: int
    tensor_rank: int
    tensor_size: int

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype}: must be {', '.join(_ITEM_BYTES)}")
        for name in ("n_layers", "n_pages", "page_tokens", "n_kv_heads", "head_dim", "total_kv_heads", "tensor_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.first_kv_head <= self.total_kv_heads - self.n_kv_heads:
            raise ValueError(
                f"first_kv_head {self.first_kv_head}: with {self.n_kv_heads} heads here it must be from 0 to "
                f"{self.total_kv_heads - self.n_kv_heads}"
            )
        if self.block_bytes % WORD_BYTES:
            raise ValueError(
                f"page_tokens {self.page_tokens} x head_dim {self.head_dim} x {_ITEM_BYTES[self.dtype]} bytes: must be "
                f"a multiple of {WORD_BYTES}"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of the keys, or the values, of one head in one page of one layer."""
        return self.page_tokens * self.head_dim * _ITEM_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return 2 * self.n_kv_heads * self.block_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of all pages of one layer."""
        return self.n_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return self.n_layers * self.layer_bytes

    def page_offset(self, layer: int, page_id: int) -> int:
        """Where a page of a layer starts, in bytes from the first page."""
        return layer * self.layer_bytes + page_id * self.page_bytes


def head_runs(
    layout: PageLayout, layer: int, page_ids: Sequence[int], first_head: int, n_heads: int
) -> list[tuple[int, int]]:
    """Where a run of heads in pages of one layer lies, keys before values: (offset, bytes) in as few runs as can be."""
    runs: list[tuple[int, int]] = []
    n_bytes, values = n_heads * layout.block_bytes, layout.n_kv_heads * layout.block_bytes
    for page in page_ids:
        start = layout.page_offset(layer, page) + first_head * layout.block_bytes
        for at in (start, start + values):
            if runs and sum(runs[-1]) == at:
                runs[-1] = (runs[-1][0], runs[-1][1] + n_bytes)
            else:
                runs.append((at, n_bytes))
    return runs


class SharedHeads(NamedTuple):
    """Key heads that two ranks hold: `n_heads` from `first_mine` of this rank and from `first_theirs` of the other."""

    first_mine: int
    first_theirs: int
    n_heads: int


def shared_heads(mine: PageLayout, theirs: PageLayout) -> SharedHeads:
    """The heads that both ranks hold, counted within each.

    Raises LayoutMismatch when the layouts differ in more than tensor parallelism, or when no head is shared.
    """
    for name in _MUST_BE_EQUAL:
        here, there = getattr(mine, name), getattr(theirs, name)
        if here != there:
            raise LayoutMismatch(
                f"KV pages differ in {name}: {here} here, {there} at the peer; start both with the same model, --dtype "
                f"and --block-size"
            )
    first = max(mine.first_kv_head, theirs.first_kv_head)
    last = min(mine.first_kv_head + mine.n_kv_heads, theirs.first_kv_head + theirs.n_kv_heads)
    if first >= last:
        raise LayoutMismatch(
            f"tensor rank {theirs.tensor_rank} of {theirs.tensor_size} holds none of the key heads of tensor rank "
            f"{mine.tensor_rank} of {mine.tensor_size}"
        )
    return SharedHeads(first - mine.first_kv_head, first - theirs.first_kv_head, last - first)


def source_ranks(mine: PageLayout, theirs: Sequence[PageLayout]) -> list[int]:
    """Which of the ranks with the layouts `theirs` this rank must read from, so that it gets each of its heads once.

    1:n, n:1 and copies of heads (more tensor ranks than heads) are covered. Raises LayoutMismatch.
    """
    missing = set(range(mine.first_kv_head, mine.first_kv_head + mine.n_kv_heads))
    chosen = []
    # Where copies exist, the ranks of one side spread over those of the other.
    start = mine.tensor_rank * len(theirs) // mine.tensor_size
    for index in (*range(start, len(theirs)), *range(start)):
        held = range(theirs[index].first_kv_head, theirs[index].first_kv_head + theirs[index].n_kv_heads)
        if missing.intersection(held):
            shared_heads(mine, theirs[index])
            missing.difference_update(held)
            chosen.append(index)
    if missing:
        raise LayoutMismatch(
            f"no tensor rank of the peer holds the key heads {sorted(missing)} of tensor rank {mine.tensor_rank} of "
            f"{mine.tensor_size}; it has {len(theirs)} ranks for {mine.total_kv_heads} key heads"
        )
    return sorted(chosen)
