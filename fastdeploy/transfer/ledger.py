"""Which reads a rank may start: nothing stale, nothing twice, nothing into pages that another read still fills."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy.errors import LayoutMismatch, StalePages
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.transfer.layout import WORD_BYTES, PageLayout


class Ledger:
    """Reads of one rank, running and done. It decides by what it is told and touches no page."""

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout
        self._running: list[tuple[PageSet, frozenset[int]]] = []
        self._newest: dict[tuple[str, str], int] = {}  # (request, owner) -> generation
        self._done: dict[tuple[str, str], dict[int, set[int]]] = {}  # (request, owner) -> layer -> own pages

    def begin(self, peer: Endpoint, source: PageSet, page_ids: Sequence[int]) -> None:
        """Note that `source` is going to be read from `peer` into `page_ids`.

        Raises StalePages, LayoutMismatch for what the peer cannot have, ValueError for what this rank cannot have.
        """
        targets = frozenset(page_ids)
        self._check_sizes(peer, source, page_ids, targets)
        key = (source.request_id, source.owner)
        newest = self._newest.get(key, source.generation)
        if source.owner != peer.owner:
            raise StalePages(
                f"{_named(source)}: offered by {source.owner}, the rank of {peer.host} is {peer.owner} now"
            )
        if source.generation < newest:
            raise StalePages(f"{_named(source)}: generation {source.generation}, the newest is {newest}")
        layers = range(source.first_layer, source.first_layer + source.n_layers)
        for other, other_targets in self._running:
            last = min(layers.stop, other.first_layer + other.n_layers)
            overlaps = max(layers.start, other.first_layer) < last and not targets.isdisjoint(other_targets)
            # Ranks of another tensor parallelism fill other heads of the same pages.
            if overlaps and (other.request_id != source.request_id or other.owner == source.owner):
                raise StalePages(
                    f"{_named(source)}: its pages {_some(targets & other_targets)} are being filled already"
                )
        if source.generation == newest:
            done = self._done.get(key, {})
            for layer in layers:
                if not targets.isdisjoint(done.get(layer, ())):
                    pages = _some(targets & done[layer])
                    raise StalePages(f"{_named(source)}: layer {layer} of pages {pages} was read already")
        else:
            self._done.pop(key, None)
        self._newest[key] = source.generation
        self._running.append((source, targets))

    def end(self, source: PageSet, *, succeeded: bool) -> None:
        """Note that a read has ended; one that failed may be tried again."""
        index = next(i for i, (running, _) in enumerate(self._running) if running is source)
        _, targets = self._running.pop(index)
        key = (source.request_id, source.owner)
        # A request that is forgotten, or has a newer generation, has nothing to note.
        if succeeded and self._newest.get(key) == source.generation:
            done = self._done.setdefault(key, {})
            for layer in range(source.first_layer, source.first_layer + source.n_layers):
                done.setdefault(layer, set()).update(targets)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        for table in (self._newest, self._done):
            for key in [key for key in table if key[0] == request_id]:
                del table[key]

    def _check_sizes(self, peer: Endpoint, source: PageSet, page_ids: Sequence[int], targets: frozenset[int]) -> None:
        mine, theirs, n = self._layout, peer.layout, len(source.page_ids)
        if len(page_ids) != n or len(targets) != n:
            raise ValueError(f"{_named(source)}: {n} pages need as many different ones here, not {len(targets)}")
        if n and not 0 <= min(targets) <= max(targets) < mine.n_pages:
            raise ValueError(f"{_named(source)}: page ids here must be from 0 to {mine.n_pages - 1}")
        if source.first_layer < 0 or source.n_layers < 1 or source.first_layer + source.n_layers > mine.n_layers:
            raise LayoutMismatch(
                f"{_named(source)}: layers {source.first_layer} to {source.first_layer + source.n_layers - 1} are "
                f"offered, the model has {mine.n_layers}"
            )
        if n and not 0 <= min(source.page_ids) <= max(source.page_ids) < theirs.n_pages:
            raise LayoutMismatch(f"{_named(source)}: page ids must be from 0 to {theirs.n_pages - 1} at {peer.host}")
        n_bytes = source.n_layers * n * theirs.n_kv_heads * WORD_BYTES
        if len(source.checks) != n_bytes:
            raise LayoutMismatch(f"{_named(source)}: {len(source.checks)} bytes of check values, must be {n_bytes}")


def _named(source: PageSet) -> str:
    return f"pages of request {source.request_id}"


def _some(pages: frozenset[int] | set[int]) -> str:
    first = ", ".join(str(page) for page in sorted(pages)[:4])
    return first if len(pages) <= 4 else f"{first}, ..."
