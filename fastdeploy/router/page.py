"""The page that the router serves at `/`: three plain files, read once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

_FOLDER = Path(__file__).with_name("static")

FILES: Mapping[bytes, tuple[bytes, bytes]] = MappingProxyType(
    {
        path: (content_type, (_FOLDER / name).read_bytes())
        for path, name, content_type in (
            (b"/", "index.html", b"text/html; charset=utf-8"),
            (b"/static/router.css", "router.css", b"text/css; charset=utf-8"),
            (b"/static/router.js", "router.js", b"text/javascript; charset=utf-8"),
        )
    }
)
