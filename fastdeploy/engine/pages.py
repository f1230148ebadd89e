"""The pages of the KV cache: who holds them, which contents can be found again, which page is reused next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """`n_pages` pages, each either free, held (by one request or several) or cached (no holder, content worth keeping).

    A page may carry a digest of its content, under which it can be found again. Pages without holder keep their digest
    and content until `allocate` needs them, least recently released first. Every operation is O(1) per page.
    """

    def __init__(self, n_pages: int) -> None:
        self._n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))  # a stack
        self._n_holders = [0] * n_pages
        self._digests: list[bytes | None] = [None] * n_pages
        self._page_of: dict[bytes, int] = {}
        # Oldest first. An OrderedDict, because taking the first key of a dict slows down with every key taken before.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def n_pages(self) -> int:
        """All pages."""
        return self._n_pages

    @property
    def n_free(self) -> int:
        """Pages without holder and without content worth keeping."""
        return len(self._free)

    @property
    def n_cached(self) -> int:
        """Pages without holder whose content can be found again."""
        return len(self._cached)

    @property
    def n_held(self) -> int:
        """Pages with at least one holder."""
        return self._n_pages - len(self._free) - len(self._cached)

    @property
    def n_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def n_holders(self, page: int) -> int:
        """How many requests hold this page."""
        return self._n_holders[page]

    def n_unheld(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody holds: holding them lowers `n_available` by that much."""
        holders = self._n_holders
        return sum(1 for page in pages if holders[page] == 0)

    def allocate(self, n: int) -> list[int] | None:
        """`n` pages without content, each with one holder; None, and no change, when there are not that many."""
        free = self._free
        n_evict = n - len(free)
        if n_evict > len(self._cached):
            return None
        for _ in range(n_evict):
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            free.append(page)
        first = len(free) - n
        pages = free[first:]
        del free[first:]
        for page in pages:
            self._n_holders[page] = 1
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Add one holder to each of these pages, all of them held or cached."""
        holders = self._n_holders
        for page in pages:
            if holders[page] == 0:
                del self._cached[page]
            holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take one holder from each of these pages of one request, given in the order of its tokens."""
        holders, digests = self._n_holders, self._digests
        # From the end: a page is useless without those before it, so the end of a sequence has to go first.
        for page in reversed(pages):
            holders[page] -= 1
            if holders[page] == 0:
                if digests[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def label(self, page: int, digest: bytes) -> bool:
        """Let a held page be found under `digest`; False, and no change, when another page is found there already."""
        if digest in self._page_of:
            return False
        self._page_of[digest] = page
        self._digests[page] = digest
        return True

    def find(self, digest: bytes) -> int | None:
        """The page with this content, held or cached."""
        return self._page_of.get(digest)

    def _forget(self, page: int) -> None:
        digest = self._digests[page]
        assert digest is not None, f"page {page} was cached without content"
        del self._page_of[digest]
        self._digests[page] = None

    def check(self) -> None:
        """Raise AssertionError when the bookkeeping contradicts itself; O(pages), for tests and debugging."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, n in enumerate(self._n_holders) if n > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & cached or free & held or cached & held), "a page is in two states"
        assert len(free) + len(cached) + len(held) == self._n_pages, "a page is lost"
        assert len(held) == self.n_held
        assert min(self._n_holders, default=0) >= 0, "a page was released too often"
        labelled = {page: digest for page, digest in enumerate(self._digests) if digest is not None}
        assert {digest: page for page, digest in labelled.items()} == self._page_of, "digests and pages disagree"
        assert cached <= labelled.keys(), "a cached page cannot be found"
        assert not free & labelled.keys(), "a free page can be found"
