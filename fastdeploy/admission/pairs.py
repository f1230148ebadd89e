"""What prefill and decode nodes tell of themselves in the cluster's table, and what is made of it for a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdeploy.admission.messages import Record
from fastdeploy.config.schema import EngineConfig
from fastdeploy.wire.messages import Pairing


def published(config: EngineConfig, ranks: Sequence[int], control_ports: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The `disaggregated` record of each data-parallel rank; empty for a mixed server."""
    transfer = config.transfer
    if transfer.role == "mixed" or not control_ports:
        return {}
    return {
        rank: {
            "role": transfer.role,
            "transfer_protocol": list(transfer.protocols),
            "cache_info": {"rdma": {"ip": transfer.host, "port": port, "rdma_port": list(transfer.rank_ports)}},
        }
        for rank, port in zip(ranks, control_ports, strict=True)
    }


def prefill_address(prefill: Record) -> dict[str, Any]:
    """Where the prefill node's core listens, as members of `disaggregate_info`; empty when it does not say."""
    cache_info = (prefill.disaggregated or {}).get("cache_info")
    found = cache_info.get("rdma") if isinstance(cache_info, Mapping) else None
    if not isinstance(found, Mapping) or not {"ip", "port"} <= found.keys():
        return {}
    return {"prefill_ip": found["ip"], "prefill_connector_port": found["port"]}


def pairing_of(info: Mapping[str, Any] | None, role: str) -> Pairing | None:
    """What the engine is told of a letter's pair; None when all of the request is computed here."""
    if info is None or role not in ("prefill", "decode"):
        return None
    host, port = info.get("prefill_ip"), info.get("prefill_connector_port")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65536:
        return None
    return Pairing("prefill" if role == "prefill" else "decode", host, port)
