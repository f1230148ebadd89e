"""From the bytes of a request to a checked struct: size, JSON, types and ranges; every error names the field."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from fastdeploy.errors import InvalidRequest, MissingField, RequestError

LOGGER = logging.getLogger(__name__)
MAX_BODY_BYTES = 32 * 1024 * 1024
BODY_TIMEOUT_S = 120.0

StructT = TypeVar("StructT", bound=msgspec.Struct)

_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


class BodyTooLarge(RequestError):
    """The body exceeds `MAX_BODY_BYTES`."""

    status = 413
    code = "request_too_large"


class BodyTooSlow(RequestError):
    """The body did not arrive within `BODY_TIMEOUT_S`."""

    status = 408
    kind = "timeout_error"
    code = "timeout"


class UnknownFields:
    """Remembers which unknown field names were seen, so that each is logged once."""

    _MOST = 1000  # names come from clients: the memory for them is bounded

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, names: set[str]) -> None:
        """Logs the names not seen before."""
        for name in sorted(names - self._seen)[: self._MOST - len(self._seen)]:
            self._seen.add(name)
            LOGGER.debug("request field %.100r is unknown here and ignored", name)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `BodyTooLarge`, `BodyTooSlow`, `InvalidRequest` for another content type than JSON."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(f"content-type must be application/json, got {kind!r}", "content-type")
    too_large = BodyTooLarge(f"the request body exceeds the limit of {MAX_BODY_BYTES} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise too_large
    chunks: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                n_bytes += len(chunk)
                if n_bytes > MAX_BODY_BYTES:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTooSlow(f"the request body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    return b"".join(chunks)


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises `InvalidRequest`."""
    try:
        fields = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"the body is not valid JSON: {exc}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return fields


def merge_extra(fields: dict[str, Any], extra_name: str, kind: type[msgspec.Struct]) -> None:
    """Fills fields that `fields` lacks from the object `fields[extra_name]`, where `kind` knows them."""
    extra = fields.get(extra_name)
    if isinstance(extra, dict):
        for name in extra.keys() & set(kind.__struct_fields__):
            if name != extra_name and fields.get(name) is None:
                fields[name] = extra[name]


def to_struct(fields: dict[str, Any], kind: type[StructT], unknown: UnknownFields) -> StructT:
    """Checks names, types and ranges. Raises `MissingField` and `InvalidRequest` naming the field."""
    strangers = fields.keys() - set(kind.__struct_fields__)
    if strangers:
        unknown.note(strangers)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as exc:
        raise _field_error(str(exc)) from None


def _field_error(text: str) -> InvalidRequest:
    """msgspec's text, e.g. "Expected `int` >= 1 - at `$.n`", as an error that names the field first."""
    found = _AT_PATH.match(text)
    what, path = (found["what"], found["path"] or "") if found else (text, "")
    missing = _MISSING.search(what)
    if missing:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return MissingField(f"{name} is required", name)
    what = what.replace("`", "").replace(" | null", "").replace("Expected", "expected", 1)
    param = re.split(r"[.\[]", path, maxsplit=1)[0] or None
    return InvalidRequest(f"{path}: {what}" if path else what, param)
