"""The server's side of registration: keeps one server known to its routers for as long as it runs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from fastdeploy.errors import ConfigError
from fastdeploy.router.record import Record
from fastdeploy.router.registry import HEARTBEAT_S
from fastdeploy.router.upstream import Upstream, UpstreamError, fetch

LOGGER = logging.getLogger(__name__)
CONSOLE_LOGGER = logging.getLogger("fastdeploy.console")
TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 1.0
ANY_ADDRESS = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class RouterAddress:
    """Where a router listens."""

    host: str
    port: int

    @property
    def shown(self) -> str:
        """As a user writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def router_addresses(text: str) -> tuple[RouterAddress, ...]:
    """The routers that `--router` names: `host:port`, several separated by commas; a scheme is tolerated.

    0.0.0.0 means this host. Raises `ConfigError`.
    """
    found = []
    for one in filter(None, (part.strip() for part in text.split(","))):
        try:
            parts = urlsplit(one if "://" in one else f"http://{one}")
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise ConfigError(f"--router {one}: {exc}") from None
        if parts.scheme != "http" or not host or not port or parts.path.strip("/") or parts.query or parts.username:
            raise ConfigError(f"--router {one}: expected HOST:PORT, as in 127.0.0.1:30000")
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        found.append(RouterAddress(loopback.get(host, host), port))
    if not found:
        raise ConfigError(f"--router {text!r}: expected HOST:PORT, as in 127.0.0.1:30000")
    return tuple(found)


async def keep_registered(
    routers: Sequence[RouterAddress],
    host: str,
    port: int,
    metrics_port: int,
    is_well: Callable[[], bool],
    *,
    role: str = "mixed",
    tp_size: int = 1,
    device_ids: Sequence[str] = (),
    connector_port: int | None = None,
    transfer_protocol: Sequence[str] = (),
    rdma_ports: Sequence[int] = (),
    interval_s: float = HEARTBEAT_S,
) -> None:
    """Register a server with every router now and then, until cancelled; then take it back. Raises nothing else.

    `host` is the address that the server is bound to; when that is any address, each router is told the one by which
    it reaches this machine. `is_well` is asked before each time: a server that is not well says nothing.
    """
    async with asyncio.TaskGroup() as group:
        for router in routers:
            record = Record(
                role=role,
                host_ip=host,
                port=str(port),
                metrics_port=str(metrics_port),
                tp_size=tp_size,
                device_ids=tuple(device_ids),
                connector_port="" if connector_port is None else str(connector_port),
                transfer_protocol=tuple(transfer_protocol),
                rdma_ports=tuple(map(str, rdma_ports)),
            )
            group.create_task(_keep(router, record, is_well, interval_s))


async def _keep(router: RouterAddress, record: Record, is_well: Callable[[], bool], interval_s: float) -> None:
    upstream = Upstream(router.host, router.port)
    state = ""  # how it went last; one line for each change
    told = record
    try:
        while True:
            if is_well():
                try:
                    told = msgspec.structs.replace(record, host_ip=await own_address(record.host_ip, router))
                    problem = await _tell(upstream, b"/register", told, TIMEOUT_S)
                except OSError as exc:
                    problem = str(exc)
                if problem != state or not state:
                    _log_change(router, told, problem, state)
                state = problem or "registered"
            await asyncio.sleep(interval_s)
    finally:
        if state == "registered":
            with contextlib.suppress(asyncio.CancelledError):
                problem = await _tell(upstream, b"/unregister", told, LEAVE_TIMEOUT_S)
                LOGGER.info("left router %s%s", router.shown, f": {problem}" if problem else "")
        upstream.close()


def _log_change(router: RouterAddress, record: Record, problem: str, state: str) -> None:
    if problem:
        CONSOLE_LOGGER.warning("router %s: not registered: %s; trying again", router.shown, problem)
    elif state != "registered":
        CONSOLE_LOGGER.info("registered at router %s as %s", router.shown, record.url)


async def _tell(upstream: Upstream, path: bytes, record: Record, timeout_s: float) -> str:
    """Why the router did not take it, "" when it did."""
    headers = [(b"content-type", b"application/json")]
    try:
        answer = await fetch(upstream, b"POST", path, timeout_s, headers, msgspec.json.encode(record))
    except UpstreamError as exc:
        return str(exc)
    if answer.status == 200:
        return ""
    return f"status {answer.status}: {answer.body[:300].decode(errors='replace')}"


async def own_address(bound: str, router: RouterAddress) -> str:
    """The IP address that a router is told: the one bound, or the one of the interface that leads to the router.

    Raises OSError when an address cannot be found.
    """
    loop = asyncio.get_running_loop()
    if bound not in ANY_ADDRESS:
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(bound))
        found = await loop.getaddrinfo(bound, None, type=socket.SOCK_STREAM)
        return str(found[0][4][0])
    family, _, _, _, address = (await loop.getaddrinfo(router.host, router.port, type=socket.SOCK_DGRAM))[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)  # sends nothing: only asks for the route
        return str(sock.getsockname()[0])
