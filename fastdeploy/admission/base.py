"""What a front end asks of a waiting room, and what a waiting room asks of the engines behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from fastdeploy.errors import EngineError
from fastdeploy.frontend.client import Sink
from fastdeploy.frontend.ledger import RankLoad
from fastdeploy.wire.messages import Submit


class WaitingRoom(Protocol):
    """Takes requests and sees to it that each one ends; all calls are made on one event loop."""

    def submit(self, requests: Iterable[Submit], inbox: Sink) -> None:
        """Take requests whose deltas go to `inbox`. Raises EngineUnavailable when nobody could run them."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests that still run; their inbox gets a last delta with finish reason "abort"."""

    def forget(self, request_ids: Iterable[str]) -> None:
        """End requests that nobody reads any more."""

    def health(self) -> str | None:
        """None while requests are served, else what is wrong."""

    def note(self) -> dict[str, str]:
        """What /health tells besides."""

    async def died(self) -> EngineError:
        """Waits until the engine is gone for good and says why."""


class Engines(WaitingRoom, Protocol):
    """The engines of this server, which `frontend.Coordinator` is: a waiting room of its own, too."""

    def loads(self) -> Mapping[int, RankLoad]:
        """What each data-parallel rank that serves has to do."""
