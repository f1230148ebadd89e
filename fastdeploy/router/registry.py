"""The servers that the router knows, and which of them may get requests. No sockets and no clock here.

A server is known by its URL. One that registered itself leaves when its health check fails, when it says so, or when
its heartbeats stop; its next heartbeat brings it back. One from the `register-path` file stays and is only skipped
while it is not well.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from fastdeploy.errors import InvalidRequest
from fastdeploy.router.ledger import Ledger, ServerLoad
from fastdeploy.router.record import Record
from fastdeploy.router.upstream import Upstream

LOGGER = logging.getLogger(__name__)
CONSOLE_LOGGER = logging.getLogger("fastdeploy.console")
HEARTBEAT_S = 5.0  # how often a server registers
EXPIRY_S = 6 * HEARTBEAT_S  # silence after which it is gone, once it has shown that it sends heartbeats


@dataclass(slots=True, eq=False)
class Server:
    """One known server."""

    record: Record
    load: ServerLoad
    upstream: Upstream
    metrics: Upstream
    is_static: bool
    heartbeat_s: float
    n_heartbeats: int = 1
    is_well: bool = False
    n_failures: int = 0  # in a row, of its last requests
    url: str = field(init=False)  # its identity, which no later record changes

    def __post_init__(self) -> None:
        self.url = self.record.url

    def close(self) -> None:
        """Close the connections that wait for another request."""
        self.upstream.close()
        self.metrics.close()


@dataclass(slots=True)
class Registry:
    """All servers, in the order of their URLs."""

    ledger: Ledger = field(default_factory=Ledger)
    is_split: bool = False  # takes prefill and decode servers instead of mixed ones
    _servers: dict[str, Server] = field(default_factory=dict)
    _available: list[Server] = field(default_factory=list)
    _by_role: dict[str, list[Server]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Server]:
        return iter([self._servers[url] for url in sorted(self._servers)])

    def __len__(self) -> int:
        return len(self._servers)

    def find(self, url: str) -> Server | None:
        """The server of that URL, if it is known."""
        return self._servers.get(url)

    @property
    def available(self) -> Sequence[Server]:
        """Those that may get requests; do not change the list."""
        return self._available

    def available_without(self, tried: Collection[str], role: str = "") -> Sequence[Server]:
        """The same without those URLs, or of one role only."""
        servers = self._by_role.get(role, []) if role else self._available
        return [server for server in servers if server.url not in tried] if tried else servers

    def check_role(self, record: Record) -> None:
        """Raises `InvalidRequest` when this router takes no such servers."""
        if self.is_split and record.role == "mixed":
            raise InvalidRequest("splitwise mode only supports PREFILL/DECODE instances, got mixed", "role")
        if not self.is_split and record.role != "mixed":
            raise InvalidRequest(f"only MIXED instances are allowed, got {record.role}", "role")

    def heartbeat(self, record: Record, now_s: float) -> Server | None:
        """Note a repeated registration; None when the server is not known, or not well, and must be looked at first."""
        server = self._servers.get(record.url)
        if server is None or not server.is_well:
            return None
        self._renew(server, record, now_s)
        return server

    def add(self, record: Record, now_s: float, is_well: bool, is_static: bool = False) -> Server:
        """Add a server, or note that it is back."""
        server = self._servers.get(record.url)
        if server is not None:
            self._renew(server, record, now_s)
            if is_well and not server.is_well:
                self.well(server)
            return server
        port, metrics_port = int(record.port), int(record.metrics_port or record.port)
        upstream = Upstream(record.host_ip, port)
        metrics = upstream if metrics_port == port else Upstream(record.host_ip, metrics_port)
        load = self.ledger.joined(record.url)
        server = Server(record, load, upstream, metrics, is_static, now_s, is_well=is_well)
        self._servers[record.url] = server
        self._renew_available()
        CONSOLE_LOGGER.info("registered %s instance: %s (%d known)", record.role, record.url, len(self))
        return server

    def _renew(self, server: Server, record: Record, now_s: float) -> None:
        server.heartbeat_s = now_s
        server.n_heartbeats += 1
        if record != server.record:
            LOGGER.info("%s registered with other values: %s", record.url, record)
            if record.metrics_port != server.record.metrics_port:
                port = int(record.metrics_port or record.port)
                server.metrics = server.upstream if port == int(record.port) else Upstream(record.host_ip, port)
            server.record = record
            self._renew_available()

    def well(self, server: Server) -> None:
        """Its health check succeeded."""
        if not server.is_well and self._servers.get(server.url) is server:
            server.is_well = True
            self._renew_available()
            CONSOLE_LOGGER.info("%s is well again", server.url)

    def unwell(self, server: Server, reason: str) -> None:
        """It gets no requests until `well` is called."""
        if server.is_well:
            server.is_well = False
            self._renew_available()
            LOGGER.warning("%s gets no requests until it has been looked at: %s", server.url, reason)

    def failed_check(self, server: Server, reason: str) -> None:
        """Its health check failed: it leaves, unless it is from the file."""
        if server.is_static:
            self.unwell(server, reason)
        else:
            self.remove(server, f"unhealthy: {reason}")

    def remove(self, server: Server, reason: str) -> None:
        """Forget a server; requests that it is answering go on."""
        if self._servers.get(server.url) is not server:
            return
        del self._servers[server.url]
        server.is_well = False
        self._renew_available()
        server.close()
        CONSOLE_LOGGER.info("removed %s instance: %s (%s; %d known)", server.record.role, server.url, reason, len(self))

    def expire(self, now_s: float) -> None:
        """Remove those whose heartbeats stopped. One that registered once only lives by its health checks."""
        for server in list(self):
            if not server.is_static and server.n_heartbeats > 1 and now_s - server.heartbeat_s > EXPIRY_S:
                self.remove(server, f"no heartbeat for {EXPIRY_S:.0f} s")

    def forget_idle_loads(self) -> None:
        """Drop the counters of servers that have gone."""
        self.ledger.forget_idle(set(self._servers))

    def counts(self) -> dict[str, int]:
        """Servers by role, as /registered_number gives them."""
        counted = {"mixed": 0, "prefill": 0, "decode": 0}
        for server in self._servers.values():
            counted[server.record.role] += 1
        return counted

    def close(self) -> None:
        """Close all idle connections."""
        for server in self._servers.values():
            server.close()

    def _renew_available(self) -> None:
        self._available = [server for server in self if server.is_well and not server.record.is_paused]
        self._by_role = {}
        for server in self._available:
            self._by_role.setdefault(server.record.role, []).append(server)
