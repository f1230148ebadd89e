"""The CURVE keys of the talk between prefill and decode servers: whoever has the common secret may take part."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import zmq
from zmq.utils import z85

from fastdeploy.config.cache_folder import default_cache_dir

SECRET = "FD_GROUP_SECRET"
_FILE = "control-secret"


def control_keys(environ: Mapping[str, str]) -> tuple[bytes, bytes]:
    """(public, secret) from FD_GROUP_SECRET; without it from a file that only this user of this machine can read."""
    shared = environ.get(SECRET) or _secret_of_user(default_cache_dir() / _FILE)
    key = z85.encode(hashlib.blake2b(b"prefill/decode control", key=_key(shared), digest_size=32).digest())
    return zmq.curve_public(key), key


def _key(shared: str) -> bytes:
    """Any secret as a key of at most 64 bytes."""
    return hashlib.blake2b(shared.encode()).digest()


def _secret_of_user(path: Path) -> str:
    """The content of the file, which is made when it is not there; of several who make it at once the first wins."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{_FILE}.{secrets.token_hex(8)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
            os.link(fresh, path)
        except FileExistsError:
            return path.read_text()
        finally:
            os.close(descriptor)
            fresh.unlink()
    return path.read_text()
