"""`disaggregate_info` of a request: which other server computes it too."""

from __future__ import annotations

from fastdeploy.config.schema import EngineConfig
from fastdeploy.entrypoints.openai.schema import GenerationRequest
from fastdeploy.errors import InvalidRequest
from fastdeploy.wire.messages import Pairing


def pairing_of(request: GenerationRequest, config: EngineConfig) -> Pairing | None:
    """What the engine is told; None for a request of this server alone. Raises InvalidRequest.

    An answer that was begun elsewhere is finished by one server: its pages hold more than a prompt.
    """
    info = request.disaggregate_info
    if info is None:
        return None
    role = config.transfer.role
    if role == "mixed":
        raise InvalidRequest(
            "disaggregate_info: this server is mixed; start it with --splitwise-role prefill or decode",
            "disaggregate_info",
        )
    if request.request_id is None:
        raise InvalidRequest(
            "request_id is required with disaggregate_info: both servers know it by that", "request_id"
        )
    text = str(info.prefill_connector_port)
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise InvalidRequest(
            f"disaggregate_info.prefill_connector_port {text!r}: must be in 1..65535", "disaggregate_info"
        )
    return None if request.completion_token_ids else Pairing(role, info.prefill_ip, int(text))


def is_left_to_decode(request: GenerationRequest, config: EngineConfig) -> bool:
    """Whether this is the prefill half of a pair that has nothing to do: decode finishes an answer that was begun."""
    begun = request.disaggregate_info is not None and bool(request.completion_token_ids)
    return begun and config.transfer.role == "prefill"
