"""Requests that two servers compute: which of their pages stay put although no step here works on them. No sockets.

On the decode side a request awaits pages: it has a slot and pages, and ranks read the prompt's keys and values into
them. Pages of one that ended meanwhile are kept until nothing writes into them any more. On the prefill side a request
waits until the decode server wants it, and its pages stay lent after its end until that server releases them.
"""

from __future__ import annotations

from fastdeploy.engine.pages import PagePool
from fastdeploy.engine.request import Request


class PairedRequests:
    """The states above; the scheduler moves requests in and out. Every page here has its holder in `pool`."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        # decode
        self.awaiting: dict[str, Request] = {}
        self.reserved: list[Request] = []  # new among `awaiting`: nobody has been asked for their pages
        self.ended: list[Request] = []  # were among `awaiting`: their pages are in `_written`
        self.filled: list[Request] = []  # have all pages and the first token: the next step decodes them
        self._written: dict[int, list[int]] = {}  # by arrival: pages without a request that pulls may still write into
        # prefill
        self.unwanted: dict[str, Request] = {}  # no decode server has asked for them yet
        self._lent: dict[str, list[int]] = {}

    @property
    def n_lent_pages(self) -> int:
        """Pages of ended requests that a decode server may still read."""
        return sum(len(pages) for pages in self._lent.values())

    @property
    def n_written_pages(self) -> int:
        """Pages of ended requests that pulls may still write into."""
        return sum(len(pages) for pages in self._written.values())

    def leave(self, request: Request) -> list[int]:
        """A request ends or starts anew: the pages that its owner may give back now."""
        if request.lends_pages and len(request.token_ids) > request.n_prompt:  # else the pages lack something
            self._lent[request.id] = request.pages
            return []
        if request in self.filled:
            self.filled.remove(request)
        if self.awaiting.pop(request.id, None) is None:
            return request.pages
        if request in self.reserved:
            self.reserved.remove(request)
            return request.pages
        self._written[request.arrival] = request.pages
        self.ended.append(request)
        return []

    def filled_up(self, request: Request) -> None:
        """All pages of a request are here and verified, and so is its first token: it decodes from the next step on."""
        del self.awaiting[request.id]
        self.filled.append(request)

    def compute_here(self, request: Request) -> None:
        """The pages do not come, and nothing writes into them any more: the prompt is to be computed here."""
        del self.awaiting[request.id]
        request.pairing = None

    def wanted(self, request: Request, first_page: int) -> None:
        """A decode server wants the pages of a prompt from `first_page` on: it can be computed."""
        del self.unwanted[request.id]
        request.first_offered = first_page

    def is_lent(self, request_id: str) -> bool:
        """Whether a decode server may still read pages of that request."""
        return request_id in self._lent

    def take_back(self, request_id: str) -> bool:
        """The decode server needs the pages no more; False when none are lent."""
        pages = self._lent.pop(request_id, None)
        if pages is not None:
            self._pool.release(pages)
        return pages is not None

    def pulls_ended(self, arrival: int) -> None:
        """Nothing writes any more into the pages of the ended request with that number."""
        self._pool.release(self._written.pop(arrival))
