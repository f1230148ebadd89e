"""Where the engine cores of an expert-parallel group meet when several servers make up the group."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping

from fastdeploy.config.args import EngineArgs
from fastdeploy.entrypoints.supervise.group import GROUP, group_environment
from fastdeploy.errors import ConfigError
from fastdeploy.wire.messages import GroupAddress

GROUP_TIMEOUT = "FD_GROUP_TIMEOUT"  # seconds for the engine cores of a group to find each other
DEFAULT_PATIENCE_S = 300.0


def group_address(engine: EngineArgs, environ: MutableMapping[str, str] = os.environ) -> GroupAddress | None:
    """What the supervisor of several servers handed down, or what follows from `--ips`; None for a group of one server.

    Takes the keys out of `environ`: neither child processes nor /config-info are to see them. Raises ConfigError.
    """
    text = environ.pop(GROUP, "")
    if not text and len(engine.ips) > 1:
        text = group_environment(engine, environ).get(GROUP, "")
    if not text:
        return None
    found = json.loads(text)
    keys = found["public_key"].encode(), found["secret_key"].encode()
    return GroupAddress(found["endpoint"], *keys, group_patience_s(environ))


def group_patience_s(environ: Mapping[str, str] = os.environ) -> float:
    """FD_GROUP_TIMEOUT. Raises ConfigError when it is no number of seconds."""
    text = environ.get(GROUP_TIMEOUT) or str(DEFAULT_PATIENCE_S)
    try:
        patience_s = float(text)
    except ValueError:
        patience_s = 0.0
    if patience_s <= 0:
        raise ConfigError(f"{GROUP_TIMEOUT} {text}: must be a number of seconds above 0")
    return patience_s
