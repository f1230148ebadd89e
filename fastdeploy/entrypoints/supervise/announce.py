"""What a server tells the process that supervises it, as JSON lines over an inherited pipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

ANNOUNCE_FD = "FD_ANNOUNCE_FD"  # environment variable: the pipe's number in the server


class Bound(msgspec.Struct, frozen=True, tag="bound", tag_field="event"):
    """The ports are bound; connections are taken from now on, and answered once the front end runs."""

    url: str
    metrics_url: str
    port: int
    metrics_port: int


class Up(msgspec.Struct, frozen=True, tag="ready", tag_field="event"):
    """The engine takes requests."""


Announcement: TypeAlias = Bound | Up
Announce: TypeAlias = Callable[[Announcement], None]

decode_announcement = msgspec.json.Decoder(Announcement).decode


def encode_announcement(announcement: Announcement) -> bytes:
    """One line."""
    return msgspec.json.encode(announcement) + b"\n"


def tell_nobody(announcement: Announcement) -> None:
    """For a server without a supervisor."""
