"""The prefill server's half of a pair: it gets the request, and what it answers is read to its end and dropped."""

from __future__ import annotations

import asyncio
from typing import Protocol

from fastdeploy.router.http1 import AnswerHead
from fastdeploy.router.ledger import Ticket
from fastdeploy.router.registry import Server
from fastdeploy.router.upstream import UpstreamConnection, UpstreamError

MAX_KEPT_BYTES = 64 * 1024  # of an answer that refuses


class Owner(Protocol):
    """Is told when prefill did not do its part."""

    def prefill_failed(self, leg: PrefillLeg, error: UpstreamError) -> None:
        """No whole answer came."""

    def prefill_refused(self, leg: PrefillLeg, status: int, body: bytes) -> None:
        """An answer with an error status came."""


class PrefillLeg:
    """One request at its prefill server; a `Receiver`. The load is released at the first byte of the body."""

    __slots__ = (
        "_connection",
        "_kept",
        "_legs",
        "_owner",
        "_request",
        "_status",
        "_task",
        "_ticket",
        "deadline_s",
        "server",
    )

    def __init__(self, owner: Owner, server: Server, ticket: Ticket, legs: set[PrefillLeg], deadline_s: float) -> None:
        """`legs` holds all that are not over."""
        self.deadline_s = deadline_s
        self.server = server
        self._owner, self._ticket, self._legs = owner, ticket, legs
        self._request = self._kept = b""
        self._status = 0
        self._connection: UpstreamConnection | None = None
        self._task: asyncio.Task[None] | None = None
        legs.add(self)

    def start(self, request: bytes) -> None:
        """Send the request."""
        self._request = request
        connection = self.server.upstream.idle()
        if connection is not None:
            self._send(connection)
        else:
            self._connect()

    def drop(self) -> None:
        """Cut it: the server ends the request."""
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.close()
        self._end()

    def _connect(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._send_on_new())

    async def _send_on_new(self) -> None:
        try:
            connection = await self.server.upstream.connect()
        except UpstreamError as exc:
            self._task = None
            self.on_failure(exc)
            return
        self._task = None
        self._send(connection)

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.send(self._request, self)

    def _end(self) -> None:
        self._connection, self._task = None, None
        self._ticket.end()
        self._legs.discard(self)

    def on_head(self, head: AnswerHead, n_body_bytes: int | None) -> None:
        """See `Receiver`."""
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        """See `Receiver`."""
        self._ticket.end()
        if self._status >= 400 and len(self._kept) < MAX_KEPT_BYTES:
            self._kept += data

    def on_end(self) -> None:
        """See `Receiver`."""
        self._end()
        if self._status >= 400:
            self._owner.prefill_refused(self, self._status, self._kept)

    def on_failure(self, error: UpstreamError) -> None:
        """See `Receiver`."""
        if error.kind == "stale":
            self._connect()
            return
        self._end()
        self._owner.prefill_failed(self, error)
