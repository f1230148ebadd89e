"""What the workers of one router tell each other, over Unix sockets in a folder that only their user can enter.

A server registers with whichever worker its connection reached; that one tells the others. Metrics are asked of all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fastdeploy.router.metrics import Figures
from fastdeploy.router.record import Record
from fastdeploy.router.upstream import Answer, Upstream, UpstreamError, fetch

LOGGER = logging.getLogger(__name__)
TIMEOUT_S = 5.0

_decode_figures = msgspec.msgpack.Decoder(Figures).decode
_decode_records = msgspec.msgpack.Decoder(list[Record]).decode


def socket_path(folder: Path, worker: int) -> Path:
    """Where a worker listens for the others."""
    return folder / f"worker-{worker}.sock"


class Peers:
    """The other workers; none when there is one worker only."""

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self._upstreams = [Upstream("peer", 0, str(path)) for path in paths]

    async def tell(self, path: bytes, body: bytes) -> None:
        """Pass a registration on; a worker that is not there learns of it by the next one."""
        await self._ask(b"POST", path, body)

    async def figures(self) -> list[Figures]:
        """The figures of the others."""
        return [_decode_figures(answer.body) for answer in await self._ask(b"GET", b"/figures")]

    async def records(self) -> list[Record]:
        """All servers that the others know."""
        found: dict[str, Record] = {}
        for answer in await self._ask(b"GET", b"/records"):
            found.update((record.url, record) for record in _decode_records(answer.body))
        return list(found.values())

    async def _ask(self, method: bytes, path: bytes, body: bytes = b"") -> list[Answer]:
        async def one(upstream: Upstream) -> Answer | None:
            try:
                return await fetch(upstream, method, path, TIMEOUT_S, body=body)
            except UpstreamError as exc:
                LOGGER.debug("a worker does not answer %s: %s", path.decode(), exc)
                return None

        answers = await asyncio.gather(*(one(upstream) for upstream in self._upstreams)) if self._upstreams else ()
        return [answer for answer in answers if answer is not None and answer.status == 200]

    def close(self) -> None:
        """Close the connections to them."""
        for upstream in self._upstreams:
            upstream.close()
