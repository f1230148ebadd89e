"""What a server says about itself when it registers: the JSON of /register, checked and brought to one form."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

import msgspec

from fastdeploy.errors import ConfigError, InvalidRequest

ROLES = ("mixed", "prefill", "decode")
PROTOCOLS = ("ipc", "rdma")

PortLike = int | str


class _Registration(msgspec.Struct):
    """The JSON as it may come; unknown keys are ignored."""

    role: str | None = None
    host_ip: str | None = None
    port: PortLike | None = None
    metrics_port: PortLike | None = None
    connector_port: PortLike | None = None
    engine_worker_queue_port: PortLike | None = None
    transfer_protocol: list[str] | None = None
    rdma_ports: list[PortLike] | None = None
    device_ids: list[PortLike] | None = None
    tp_size: PortLike | None = None
    version: str | None = None
    is_paused: bool | None = None
    connected_decodes: list[dict[str, Any]] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A server as it registered; ports and ids are text, "" where nothing was said."""

    role: str
    host_ip: str
    port: str
    metrics_port: str = ""
    connector_port: str = ""
    engine_worker_queue_port: str = ""
    transfer_protocol: tuple[str, ...] = ()
    rdma_ports: tuple[str, ...] = ()
    device_ids: tuple[str, ...] = ()
    tp_size: int = 1
    version: str = ""
    is_paused: bool = False

    @property
    def url(self) -> str:
        """What identifies the server."""
        host = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip
        return f"http://{host}:{self.port}"

    def shown(self) -> dict[str, Any]:
        """An entry of /registered."""
        fields = msgspec.to_builtins(self)
        own = {"url": self.url, "worker_type": self.role}
        names = ("connector_port", "engine_worker_queue_port", "transfer_protocol", "rdma_ports", "device_ids")
        return own | {name: fields[name] for name in (*names, "metrics_port", "tp_size", "version", "is_paused")}


def parse_record(body: bytes) -> Record:
    """The record in the body of /register. Raises `InvalidRequest`."""
    try:
        given = msgspec.json.decode(body, type=_Registration)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"invalid registration: {exc}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"invalid JSON: {exc}") from None
    return _checked(given)


def record_of(fields: Any) -> Record:
    """The same for an entry of a `register-path` file. Raises `ConfigError`."""
    try:
        return _checked(msgspec.convert(fields, _Registration))
    except (msgspec.ValidationError, InvalidRequest) as exc:
        raise ConfigError(str(exc)) from None


def _checked(given: _Registration) -> Record:
    role = (given.role or "").lower()
    if not role:
        raise InvalidRequest("role is required", "role")
    if role not in ROLES:
        raise InvalidRequest(f"invalid role {given.role!r}: it is one of {', '.join(ROLES)}", "role")
    if not given.host_ip:
        raise InvalidRequest("host_ip is required", "host_ip")
    try:
        host_ip = str(ipaddress.ip_address(given.host_ip))
    except ValueError:
        raise InvalidRequest(f"invalid host_ip {given.host_ip!r}: it must be an IP address", "host_ip") from None
    if given.port is None:
        raise InvalidRequest("port is required", "port")
    protocols = tuple(name.lower() for name in given.transfer_protocol or ())
    if not set(protocols) <= set(PROTOCOLS):
        raise InvalidRequest(
            f"invalid protocol in {list(protocols)}: each is one of {', '.join(PROTOCOLS)}", "transfer_protocol"
        )
    device_ids = tuple(map(str, given.device_ids or ()))
    return Record(
        role=role,
        host_ip=host_ip,
        port=_port("port", given.port),
        metrics_port=_port("metrics_port", given.metrics_port),
        connector_port=_port("connector_port", given.connector_port),
        engine_worker_queue_port=_port("engine_worker_queue_port", given.engine_worker_queue_port),
        transfer_protocol=protocols,
        rdma_ports=tuple(_port("rdma_ports", one) for one in given.rdma_ports or ()),
        device_ids=device_ids,
        tp_size=_tp_size(given.tp_size, device_ids),
        version=given.version or "",
        is_paused=bool(given.is_paused),
    )


def _port(name: str, value: PortLike | None) -> str:
    if value is None or value == "":
        return ""
    text = str(value).strip()
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise InvalidRequest(f"invalid {name} {value!r}: it must be in 1..65535", name)
    return str(int(text))


def _tp_size(value: PortLike | None, device_ids: Sequence[str]) -> int:
    if value is None or value == "":
        return max(len(device_ids), 1)
    text = str(value)
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise InvalidRequest(f"invalid tp_size {value!r}: it must be at least 1", "tp_size")
    return int(text)
