"""Who gets a request: one mixed server, or with --splitwise a prefill and a decode server. No sockets here.

In a pair both get the same request at the same time. Prefill computes the prompt and hands its KV pages over, decode
answers. The fields that a pair is told about each other are those of `disaggregate_info`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from fastdeploy.errors import InvalidRequest
from fastdeploy.router.policies import Ask, Policy, SchedulerSettings, make_policy
from fastdeploy.router.prefix_index import PrefixIndex
from fastdeploy.router.prompt_text import PromptFigures
from fastdeploy.router.record import Record
from fastdeploy.router.registry import Registry, Server

_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """How pairs are used.

    `min_prompt_tokens`: a prompt of which decode lacks fewer tokens goes to decode alone; 0 pairs every request.
    `preempt_retry_count`: how often a request that decode gave up half-way is placed again.
    """

    min_prompt_tokens: int = 0
    preempt_retry_count: int = 3
    preempt_retry_exclude_decode: bool = False


class Placement(msgspec.Struct, frozen=True):
    """`server` answers the client; `prefill` is None when it does the whole work."""

    server: Server
    prefill: Server | None = None


class Placer(Protocol):
    """One way to place requests. `nobody` is said when there is no server for one."""

    policies: Sequence[Policy]
    wants_text: bool
    is_split: bool
    nobody: str

    def can_place(self, tried: Collection[str]) -> bool:
        """Whether there are servers besides those URLs."""

    def tidy(self, now_s: float) -> None:
        """Forget what is old; called now and then."""

    def place(
        self, figures: PromptFigures, now_s: float, tried: Collection[str], is_begun: bool = False
    ) -> Placement | None:
        """Choose; None when nobody is there. Raises `InvalidRequest` when the servers that are do not fit together.

        is_begun: the request comes with the beginning of its answer, and one server does the whole rest.
        """


class MixedPlacer:
    """One server, chosen by one policy."""

    is_split = False
    nobody = "No available workers"

    def __init__(self, registry: Registry, policy: Policy) -> None:
        self.policies: Sequence[Policy] = (policy,)
        self.wants_text = policy.needs_text
        self._registry, self._policy = registry, policy

    def can_place(self, tried: Collection[str]) -> bool:
        """See `Placer`."""
        return bool(self._registry.available_without(tried))

    def place(
        self, figures: PromptFigures, now_s: float, tried: Collection[str], is_begun: bool = False
    ) -> Placement | None:
        """See `Placer`."""
        servers = self._registry.available_without(tried)
        if not servers:
            return None
        return Placement(_chosen(self._policy, servers, figures, now_s))

    def tidy(self, now_s: float) -> None:
        """See `Placer`."""
        self._policy.tidy(now_s)


class PairPlacer:
    """A prefill server by its policy and a decode server by another; or decode alone where a transfer does not pay, the
    answer has begun already, or no prefill server is there that has not failed the request.

    The counters say how often which was decided.
    """

    is_split = True
    nobody = "No available prefill/decode workers"

    def __init__(self, registry: Registry, scheduler: SchedulerSettings, pairs: PairSettings) -> None:
        self._registry = registry
        self._prefill = make_policy(scheduler, scheduler.prefill_policy)
        self._decode = make_policy(scheduler, scheduler.decode_policy)
        self._min_tokens = pairs.min_prompt_tokens
        self._seen = PrefixIndex(scheduler.cache_block_size, scheduler.eviction_duration_mins * 60)
        self.policies: Sequence[Policy] = (self._prefill, self._decode)
        self.wants_text = self._min_tokens > 0 or any(policy.needs_text for policy in self.policies)
        self.n_pairs = self.n_short = self.n_cached = self.n_failed = self.n_begun = 0

    def can_place(self, tried: Collection[str]) -> bool:
        """See `Placer`. Without a prefill server a decode server is enough."""
        return bool(self._registry.available_without(tried, "decode"))

    def place(
        self, figures: PromptFigures, now_s: float, tried: Collection[str], is_begun: bool = False
    ) -> Placement | None:
        """See `Placer`."""
        decodes = self._registry.available_without(tried, "decode")
        if is_begun and decodes:
            self.n_begun += 1
            return Placement(_chosen(self._decode, decodes, figures, now_s))
        alone = self._alone(decodes, figures, now_s) if self._min_tokens and decodes else None
        if alone is not None:
            return Placement(alone)
        prefills = self._registry.available_without(tried, "prefill")
        if not decodes:
            return None
        if not prefills:
            self.n_failed += 1
            return Placement(_chosen(self._decode, decodes, figures, now_s))
        sizes = {server.record.tp_size for server in decodes}
        fitting = [one for one in prefills if 1 in sizes or one.record.tp_size in sizes]
        if not fitting:
            raise InvalidRequest(
                f"tensor parallel sizes of prefill ({_sizes(prefills)}) and decode ({_sizes(decodes)}) do not fit: "
                "they must be equal, or 1 at decode"
            )
        prefill = _chosen(self._prefill, fitting, figures, now_s)
        decode = _chosen(self._decode, [one for one in decodes if fit(prefill.record, one.record)], figures, now_s)
        self.n_pairs += 1
        if self._min_tokens:
            self._seen.record(self._seen.keys(figures.text), decode.load.generation, now_s)
        return Placement(decode, prefill)

    def _alone(self, decodes: Sequence[Server], figures: PromptFigures, now_s: float) -> Server | None:
        """The decode server that lacks too little of the prompt for a transfer; an unknown prompt is a long one."""
        n_tokens = figures.n_prompt_tokens
        if not n_tokens:
            return None
        keys = self._seen.keys(figures.text)
        if n_tokens < self._min_tokens:
            self.n_short += 1
            decode = _chosen(self._decode, decodes, figures, now_s)
        else:
            matched = self._seen.match(keys, {server.load.generation for server in decodes}) if keys else {}
            decode = max(decodes, key=lambda server: matched.get(server.load.generation, 0))
            n_lacking = n_tokens * (1 - matched.get(decode.load.generation, 0) / len(keys)) if keys else n_tokens
            if n_lacking >= self._min_tokens:
                return None
            self.n_cached += 1
        self._seen.record(keys, decode.load.generation, now_s)
        return decode

    def tidy(self, now_s: float) -> None:
        """See `Placer`."""
        for policy in self.policies:
            policy.tidy(now_s)
        self._seen.evict(now_s)


def fit(prefill: Record, decode: Record) -> bool:
    """Whether the KV pages of one can be those of the other."""
    return decode.tp_size in (1, prefill.tp_size)


def disaggregate_info(prefill: Record, decode: Record) -> dict[str, Any]:
    """What both servers of a pair are told."""
    is_local = prefill.host_ip == decode.host_ip and prefill.tp_size == decode.tp_size
    ipc = is_local and "ipc" in prefill.transfer_protocol and "ipc" in decode.transfer_protocol
    return {
        "prefill_ip": prefill.host_ip,
        "decode_ip": decode.host_ip,
        "prefill_connector_port": int(prefill.connector_port or 0),
        "decode_connector_port": int(decode.connector_port or 0),
        "decode_device_ids": list(decode.device_ids),
        "decode_rdma_ports": list(decode.rdma_ports),
        "transfer_protocol": "ipc" if ipc else "rdma",
        "decode_tp_size": decode.tp_size,
    }


class SplitBody:
    """The members of a request's body, to which those of a pair are added. Raises `InvalidRequest` for what is no JSON
    object."""

    def __init__(self, body: bytes, default_id: str) -> None:
        try:
            self._members: dict[str, Any] = dict(_decode_members(body))
            given = msgspec.json.decode(self._members.pop("request_id", b"null"))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise InvalidRequest("Invalid JSON format: the body must be a JSON object") from None
        self._members.pop("disaggregate_info", None)  # that is for the router to say
        self.request_id = given if isinstance(given, str) and given else default_id
        self.completion_token_ids: list[int] = []

    @property
    def is_begun(self) -> bool:
        """Whether it comes with tokens of its answer, from the client or from a server that gave it up."""
        given = bytes(self._members.get("completion_token_ids", b"")).strip()
        return bool(self.completion_token_ids) or given not in (b"", b"null", b"[]")

    def written(self, placement: Placement, n_retries: int) -> bytes:
        """The body for a placement; every retry has an id of its own, as the one before may still be ending."""
        request_id = f"{self.request_id}-retry{n_retries}" if n_retries else self.request_id
        members = {**self._members, "request_id": request_id}
        if placement.prefill is not None:
            members["disaggregate_info"] = disaggregate_info(placement.prefill.record, placement.server.record)
        if self.completion_token_ids:
            members["completion_token_ids"] = self.completion_token_ids
        return msgspec.json.encode(members)


class _Message(msgspec.Struct):
    completion_token_ids: list[int] | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    message: _Message | None = None
    completion_token_ids: list[int] | None = None


class _Outcome(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


def given_up(answer: bytes) -> list[int] | None:
    """The tokens so far in a whole answer of a decode server that had to give the request up; None when it did not."""
    if b"pd_reschedule" not in answer and b"PD Error" not in answer:
        return None
    try:
        outcome = msgspec.json.decode(answer, type=_Outcome)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    error = outcome.error.get("message") if isinstance(outcome.error, dict) else outcome.error
    if not any(one.finish_reason == "pd_reschedule" for one in outcome.choices):
        return [] if isinstance(error, str) and "PD Error" in error else None
    if len(outcome.choices) > 1:
        return []
    (choice,) = outcome.choices
    return choice.completion_token_ids or (choice.message and choice.message.completion_token_ids) or []


def _chosen(policy: Policy, servers: Sequence[Server], figures: PromptFigures, now_s: float) -> Server:
    if servers[0].load.shared is not None:
        for server in servers:
            server.load.see_others()
    ask = Ask(figures.n_tokens, figures.text, now_s)
    return servers[policy.pick([server.load for server in servers], ask)]


def _sizes(servers: Sequence[Server]) -> str:
    return ", ".join(sorted({str(server.record.tp_size) for server in servers}))
