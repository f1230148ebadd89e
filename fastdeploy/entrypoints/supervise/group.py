"""The meeting point of an expert-parallel group: made once, by the process that starts its servers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from fastdeploy.config.args import EngineArgs

GROUP = "FD_GROUP"  # environment variable of every server of the group
GROUP_SECRET = "FD_GROUP_SECRET"
GROUP_PORT = 8001  # over several machines; even ones are the servers' own by default

_logger = logging.getLogger(__name__)


def group_environment(engine: EngineArgs, environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to the servers' environment so that their engine cores find each other.

    FD_GROUP is a JSON object: `endpoint` (a ZMQ address that data parallel rank 0 binds), `public_key` and `secret_key`
    (a CURVE pair, Z85). Empty when there is nothing to agree on. On one machine all three are random; on several, each
    with its own supervisor, they follow from the flags and FD_GROUP_SECRET, without which a warning is logged.
    """
    if not _is_group(engine):
        return {}
    from fastdeploy.wire.channel import new_endpoint, new_keys

    port = group_port(engine)
    if port is not None:
        endpoint = f"tcp://{_bracketed(engine.ips[0])}:{port}"
        if not environ.get(GROUP_SECRET):
            _logger.warning(
                "the group is not protected: who reaches %s and knows the flags can join; set %s alike on all machines",
                endpoint,
                GROUP_SECRET,
            )
        public, secret = _derived_keys(engine, environ.get(GROUP_SECRET, ""))
    else:
        endpoint = new_endpoint()
        public, secret = new_keys()
    return {GROUP: json.dumps({"endpoint": endpoint, "public_key": public.decode(), "secret_key": secret.decode()})}


def group_port(engine: EngineArgs) -> int | None:
    """TCP port at which the cores of several machines meet: the first --engine-worker-queue-port, if given.

    None when there is no such port, as on one machine.
    """
    if not _is_group(engine) or len(engine.ips) <= 1:
        return None
    return engine.engine_worker_queue_port[0] if engine.engine_worker_queue_port else GROUP_PORT


def _is_group(engine: EngineArgs) -> bool:
    return engine.enable_expert_parallel and engine.data_parallel_size > 1


def _derived_keys(engine: EngineArgs, shared_secret: str) -> tuple[bytes, bytes]:
    """(public, secret), equal on all machines that were given the same command and the same FD_GROUP_SECRET."""
    import zmq
    from zmq.utils import z85

    facts = [Path(engine.model).name, engine.ips, engine.tensor_parallel_size, engine.data_parallel_size]
    digest = hashlib.blake2b(json.dumps(facts).encode(), key=_key_of(shared_secret), digest_size=32).digest()
    secret = z85.encode(digest)
    return zmq.curve_public(secret), secret


def _key_of(shared_secret: str) -> bytes:
    """Any secret as a key of at most 64 bytes."""
    return hashlib.blake2b(shared_secret.encode()).digest() if shared_secret else b""


def _bracketed(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
