"""What the requests of one HTTP server share: the engine behind it, its limits, and which requests are alive."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import EngineUnavailable, InvalidRequest, Overloaded

if TYPE_CHECKING:
    from fastdeploy.frontend.chat_template import ChatTemplate
    from fastdeploy.frontend.generation import Generator
    from fastdeploy.observability.metrics import Metrics


@dataclass(slots=True)
class LiveRequest:
    """One HTTP request in the engine: the ids it has there (one per prompt) and the tokens generated so far."""

    engine_ids: tuple[str, ...]
    n_generated: int = 0


class LiveRequests:
    """The generation requests between their acceptance and their last byte, by public id."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveRequest] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request_id: str, n_prompts: int) -> LiveRequest:
        """Registers a request. Raises `InvalidRequest` when one of that id is alive."""
        if request_id in self._by_id:
            raise InvalidRequest(
                f"request_id {request_id!r} belongs to a request that is still running; choose another", "request_id"
            )
        engine_ids = (request_id,) if n_prompts == 1 else tuple(f"{request_id}-p{k}" for k in range(n_prompts))
        live = self._by_id[request_id] = LiveRequest(engine_ids)
        return live

    def remove(self, request_id: str) -> None:
        """Forgets a request that `add` registered."""
        del self._by_id[request_id]

    def find(self, named: str) -> tuple[str, LiveRequest] | None:
        """The request meant by `named`, which may lack the prefix that the server put before it."""
        for request_id in (named, f"chatcmpl-{named}", f"cmpl-{named}"):
            if live := self._by_id.get(request_id):
                return request_id, live
        return None

    def ids(self) -> list[str]:
        """The public ids, in order of arrival."""
        return list(self._by_id)


class Slots:
    """How many generation requests are held at once; a slot is kept until the last byte is out."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_used = 0

    def take(self) -> None:
        """Raises `Overloaded` when all are taken."""
        if self.n_used >= self.limit:
            raise Overloaded(f"Too many requests, current max concurrency is {self.limit}; retry later")
        self.n_used += 1

    def give_back(self) -> None:
        """Returns a slot."""
        self.n_used -= 1


@dataclass(slots=True, kw_only=True)
class ServerState:
    """Handed to `create_app`.

    `generator` and `chat_template` are None until the engine is up; `closing` is set once, to why no request is taken.
    """

    config: EngineConfig
    metrics: Metrics
    slots: Slots
    chat_template: ChatTemplate | None = None
    generator: Generator | None = None
    verify_model: bool = False  # refuse other model names (--served-model-name was given)
    api_keys: tuple[str, ...] = ()
    max_waiting_s: float | None = None  # longest wait for the first token
    silence_s: float | None = None  # engine silence after which a request looks at the engine's health
    serves_metrics: bool = True  # /metrics and /config-info are on this port
    environment: Mapping[str, str] = field(default_factory=dict)  # for /config-info
    stage: str = "starting"
    closing: str | None = None
    started_s: int = field(default_factory=lambda: int(time.time()))
    live: LiveRequests = field(default_factory=LiveRequests)

    def health(self) -> str | None:
        """None when requests are served, else the reason why not."""
        if self.closing is not None:
            return self.closing
        if self.generator is None:
            return self.stage
        return self.generator.health()

    def engine(self) -> Generator:
        """The running engine. Raises `EngineUnavailable` while it starts and when the server shuts down."""
        if self.closing is not None:
            raise EngineUnavailable(f"the server takes no requests: {self.closing}")
        if self.generator is None:
            raise EngineUnavailable(f"the engine is not up yet ({self.stage}); retry when /health answers 200")
        return self.generator

    def abort(self, named: Iterable[str]) -> tuple[list[tuple[str, int]], list[str]]:
        """Aborts requests by public id, also while shutting down.

        Returns those that were alive with their generated tokens, and the names not found.
        Raises `EngineUnavailable` before the engine is up.
        """
        generator = self.generator or self.engine()
        aborted: list[tuple[str, int]] = []
        missing: list[str] = []
        for name in dict.fromkeys(named):
            found = self.live.find(name)
            if found is None:
                missing.append(name)
                continue
            request_id, live = found
            generator.abort(live.engine_ids)
            aborted.append((request_id, live.n_generated))
        return aborted, missing
