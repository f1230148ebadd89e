"""Pure: which node of the cluster a request goes to."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec

from fastdeploy.admission.messages import Record
from fastdeploy.admission.pairs import prefill_address


class Cluster:
    """The nodes, as far as this server has watched them; times are monotonic seconds.

    A node is lost when its record stood still for the expiry while this server could see it: after a cut everybody
    gets a full period to report again. A record that was taken away is a node that left.
    """

    def __init__(self, expire_s: float) -> None:
        self.records: dict[str, Record] = {}
        self._expire_s = expire_s
        self._ts: dict[str, float] = {}
        self._changed_s: dict[str, float] = {}
        self._looked_s = float("-inf")

    def update(self, records: Mapping[str, Record], now_s: float) -> set[str]:
        """Take in the whole table; returns the nodes that were lost or have left since the last call."""
        fresh_look = now_s - self._looked_s > self._expire_s / 2
        self._looked_s = now_s
        for node, record in records.items():
            if fresh_look or self._ts.get(node) != record.ts:
                self._changed_s[node] = now_s
        self._ts = {node: record.ts for node, record in records.items()}
        self._changed_s = {node: self._changed_s[node] for node in records}
        before = set(self.records)
        self.records = {n: r for n, r in records.items() if now_s - self._changed_s[n] <= self._expire_s}
        return before - self.records.keys()

    def schedulable(self, model: str, redis_s: float) -> dict[str, Record]:
        """Nodes of this model that have reported within the expiry, by the clock of Redis."""
        return {n: r for n, r in self.records.items() if r.model == model and redis_s - r.ts <= self._expire_s}


def choose(
    nodes: Mapping[str, Record], loads: Mapping[str, int], n_prompt: int, rng: random.Random
) -> tuple[str, ...] | None:
    """The nodes of a request: one that does everything, or (decode, prefill). None when there is none.

    `loads` replaces what the records say. At random among those that are nearly as idle as the idlest.
    """
    first = [n for n, r in nodes.items() if r.role != "decode"]
    decodes = [n for n, r in nodes.items() if r.role == "decode"]
    if not decodes:
        first = [n for n in first if nodes[n].role == "mixed"]
    if not first:
        return None
    chosen = _within(first, loads, band_tokens(n_prompt), rng)
    if nodes[chosen].role == "mixed":
        return (chosen,)
    return _within(decodes, loads, min(len(decodes), 10), rng), chosen


def band_tokens(n_prompt: int) -> int:
    """How much more load than the least still counts as equal, in prompt tokens."""
    return min(max(n_prompt // 2 if n_prompt < 1000 else n_prompt // 10, 100), 500)


def disaggregate_info(decode: Record, prefill: Record) -> dict[str, Any]:
    """What both nodes of a pair are told: the decode node's record with one transfer protocol, and where prefill is."""
    info = dict(decode.disaggregated or {})
    offered = info.get("transfer_protocol") or []
    offered = [offered] if isinstance(offered, str) else list(offered)
    if {"ipc", "rdma"} <= set(offered):
        info["transfer_protocol"] = "ipc" if decode.host == prefill.host else "rdma"
    elif offered:
        info["transfer_protocol"] = offered[0]
    return info | prefill_address(prefill)


def decoded(raw: Mapping[bytes, bytes]) -> dict[str, Record]:
    """The hash as Redis gives it; what is no record is passed over."""
    records = {}
    for node, value in raw.items():
        try:
            records[node.decode()] = _decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return records


_decode = msgspec.json.Decoder(Record).decode


def _within(nodes: list[str], loads: Mapping[str, int], band: int, rng: random.Random) -> str:
    least = min(loads[n] for n in nodes)
    return rng.choice([n for n in nodes if loads[n] < least + band])
