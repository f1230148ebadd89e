"""Which pages hold which beginnings: names full pages by their tokens and finds them again.

A page's name is blake2b-128 over the name of the page before it and its own token ids (32 bits each, so one list of ids
has one encoding). A name therefore stands for all tokens up to the page's end, and two different beginnings share a
name only by a collision of a cryptographic hash (odds of about 2^-65 among 2^32 pages): no prompt can be crafted to
read pages of another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from fastdeploy.engine.pages import PagePool

_DIGEST_BYTES = 16


class PageNames:
    """The names of one request's full pages, each computed once, when first asked for.

    `token_ids` is the request's own list: it may grow at its end and must not change otherwise.
    """

    __slots__ = ("_names", "_page_tokens", "_token_ids")

    def __init__(self, token_ids: list[int], page_tokens: int) -> None:
        self._token_ids = token_ids
        self._page_tokens = page_tokens
        self._names: list[bytes] = []

    def first(self, n_pages: int) -> list[bytes]:
        """Names of the first `n_pages` pages, whose tokens must all be known."""
        names, size = self._names, self._page_tokens
        if n_pages * size > len(self._token_ids):
            raise ValueError(f"{n_pages} pages of {size} tokens are more than the {len(self._token_ids)} tokens known")
        for i in range(len(names), n_pages):
            digest = blake2b(names[-1] if names else b"", digest_size=_DIGEST_BYTES)
            digest.update(array("I", self._token_ids[i * size : (i + 1) * size]))
            names.append(digest.digest())
        return names[:n_pages]


class PrefixCache:
    """Finds and names pages of `pool`. Holding them is the caller's business."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self._pool = pool
        self._page_tokens = page_tokens

    def match(self, names: PageNames, n_tokens: int) -> list[int]:
        """Pages that hold the longest known beginning of a sequence of `n_tokens` tokens.

        At most `(n_tokens - 1) // page_tokens` pages: the last token must be computed, because its logits are wanted.
        """
        pages: list[int] = []
        for name in names.first((n_tokens - 1) // self._page_tokens):
            page = self._pool.find(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def register(self, names: PageNames, pages: Sequence[int], first: int, end: int) -> None:
        """Let the held `pages[first:end]` be found; all their keys and values must have been computed.

        Where the same content is registered already (two requests computed it at once), the page stays private.
        """
        full = names.first(end)
        for i in range(first, end):
            self._pool.label(pages[i], full[i])
