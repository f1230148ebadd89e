"""Where things are kept that can be made again: converted models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$FD_CACHE_DIR`, else `$XDG_CACHE_HOME/fastdeploy`, else `~/.cache/fastdeploy`; absolute, maybe not there yet."""
    if own := os.environ.get("FD_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").expanduser().absolute() / "fastdeploy"
