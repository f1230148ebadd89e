"""What servers write into Redis: requests and cluster records as JSON, results as msgpack. Decoding is checking."""

from __future__ import annotations

from typing import Any

import msgspec

from fastdeploy.config.admission import Role
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import TokenDelta


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node in the hash `<topic>.cluster`: one data-parallel rank."""

    ts: float  # seconds, by the clock of Redis
    role: Role
    load: int  # prompt tokens that have not ended; of a decode node the number of requests
    host: str
    disaggregated: dict[str, Any] | None = None
    model: str = ""  # fingerprint: requests go to nodes of the same model only


class Place(msgspec.Struct, frozen=True, tag="request", tag_field="type", omit_defaults=True):
    """A request for another node. `attempt` counts the times it was placed: results of an older one are void."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float  # unix seconds
    group: str  # the list that results go to
    attempt: int
    output_token_ids: list[int] = []  # already with the client
    disaggregate_info: dict[str, Any] | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="type"):
    """An attempt that nobody waits for any more."""

    request_id: str
    attempt: int
    group: str


class Result(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What came of an attempt; `seq` counts its results from 0, which says that it was taken and has no delta.

    That one has the time, by the clock of Redis: the node's load reports from then on count the request.
    """

    request_id: str
    attempt: int
    seq: int
    node: str
    delta: TokenDelta | None
    taken_s: float = 0.0


def attempt_id(request_id: str, attempt: int, group: str) -> str:
    """The id of an attempt in the engine that runs it; unique over all servers."""
    return f"{request_id}#{attempt}#{group}"


encode_json = msgspec.json.Encoder().encode
encode_results = msgspec.msgpack.Encoder().encode
decode_record = msgspec.json.Decoder(Record).decode
decode_letter = msgspec.json.Decoder(Place | Cancel).decode
decode_results = msgspec.msgpack.Decoder(list[Result]).decode
