"""What engine cores of prefill and decode servers say to each other about one request.

Decode asks (`Want`), prefill answers. Everything is about the request called `request_id` on both sides. All of it may
be lost or come twice, when a connection breaks: nobody waits for ever, and nobody believes what it did not ask for.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeAlias

import msgspec

from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.wire.messages import TokenLogprobs


class _Control(msgspec.Struct, tag=True, frozen=True, array_like=True, gc=False):
    """Base of all messages."""


# ---- decode -> prefill -------------------------------------------------------------------------------------------


class Want(_Control, frozen=True):
    """Compute this prompt and offer its pages from number `first_page` on; room for them is reserved here."""

    request_id: str
    prompt_hash: bytes
    first_page: int


class Release(_Control, frozen=True):
    """Nothing more is wanted: give the pages back, stop computing."""

    request_id: str


class StillHere(_Control, frozen=True):
    """Said every second, both ways, while there is anything between the two. `core` is new for every start."""

    core: str


class WhoIsThere(_Control, frozen=True):
    """The first thing said on a connection."""


WantCommand: TypeAlias = Want | Release | StillHere | WhoIsThere


# ---- prefill -> decode -------------------------------------------------------------------------------------------


class Ranks(_Control, frozen=True):
    """Answer to `WhoIsThere`: the ports of all cores of this server; the request may be on any of them."""

    core: str
    ports: list[int]


class Accepted(_Control, frozen=True):
    """The request is here and will be computed. `endpoints`: of this core's tensor ranks, in order."""

    request_id: str
    endpoints: list[Endpoint]


class Offer(_Control, frozen=True):
    """Pages that tensor rank `source` has computed; the first is page `first_page` of the prompt."""

    request_id: str
    source: int
    first_page: int
    pages: PageSet


class FirstToken(_Control, frozen=True):
    """The first token of the answer; all pages have been offered."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs | None] | None


class Refused(_Control, frozen=True):
    """There will be no pages (any more), and why."""

    request_id: str
    reason: str


OfferEvent: TypeAlias = Ranks | Accepted | Offer | FirstToken | Refused | StillHere


def prompt_hash(prompt_ids: Sequence[int]) -> bytes:
    """Equal on both sides when they read the same tokens out of the request."""
    return blake2b(array("I", prompt_ids).tobytes(), digest_size=16).digest()
