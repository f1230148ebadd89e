"""Tells which pages of a step are complete, with their check values, so that ranks of other servers can read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdeploy.transfer.base import PageSet
from fastdeploy.transfer.memory import PageMemory
from fastdeploy.wire.messages import PageOrder, PagesComputed

_N_PARTS = 4  # messages per order: reading starts while the later layers are computed


class Lender:
    """The orders of the step that runs; one step at a time.

    With `by_layer` (a CPU, where a layer that returned is computed) pages are offered in parts of the layers, while the
    step goes on; else all at once when its result has been read.
    """

    def __init__(
        self, memory: PageMemory, owner: str, send: Callable[[PagesComputed], None], *, by_layer: bool
    ) -> None:
        self._memory = memory
        self._owner = owner
        self._send = send
        self._n_layers = memory.layout.n_layers
        self._part = -(-self._n_layers // _N_PARTS) if by_layer else self._n_layers + 1
        self._orders: Sequence[PageOrder] = ()
        self._n_done = self._n_offered = 0

    def begin(self, orders: Sequence[PageOrder]) -> None:
        """A step with these orders is launched."""
        self._orders = orders
        self._n_done = self._n_offered = 0

    def layer_done(self) -> None:
        """The next layer of the step is computed."""
        if self._orders:
            self._n_done += 1
            if self._n_done - self._n_offered >= self._part:
                self._offer(self._n_done)

    def finish(self) -> None:
        """The step is over: offer what is left."""
        self._offer(self._n_layers)
        self._orders = ()

    def _offer(self, end: int) -> None:
        first, self._n_offered = self._n_offered, end
        if first >= end:
            return
        for order in self._orders:
            checks = self._memory.checks(order.page_ids, first, end - first)
            pages = PageSet(self._owner, order.request_id, order.generation, order.page_ids, first, end - first, checks)
            self._send(PagesComputed(order.first_page, pages))
