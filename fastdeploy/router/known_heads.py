"""Heads that came before. A peer says the same head again and again but for a few headers, so it is looked up here
instead of being parsed anew.

httptools reads every head once, and what it made of it is kept under the bytes of that head, without the digits of its
content-length and without the lines whose text changes nothing (ids, the date). A message is found here only when it
is whole, in one piece, with nothing behind it, and when all the rest of its head is equal byte by byte. So nothing is
accepted here that the parser has not accepted.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar

MAX_HEADS = 512
MAX_KEY_BYTES = 4096
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d{1,8})\r\n")
_REQUEST_ID = re.compile(rb"\r\n([Xx]-[Rr]equest-[Ii]d: [!-~]*)(?=\r\n)")
_ID_OR_DATE = re.compile(rb"\r\n((?:[Xx]-[Rr]equest-[Ii]d|[Dd]ate): [!-~][ -~]*)(?=\r\n)")
_UNUSUAL = frozenset({b"expect", b"transfer-encoding", b"upgrade"})

Read = TypeVar("Read")  # what was made of a head, without the lines that vary


class KnownHeads(Generic[Read]):
    """The heads of requests or of answers."""

    def __init__(self, of_requests: bool) -> None:
        """`varying`: the headers whose lines are cut out."""
        self.varying = (b"x-request-id",) if of_requests else (b"x-request-id", b"date")
        self._lines = (_REQUEST_ID if of_requests else _ID_OR_DATE).findall
        self._known: dict[bytes, Read] = {}

    def find(self, data: bytes) -> tuple[Read, bytes, list[bytes]] | None:
        """What is known of the head of the message that `data` is, its body, and the lines (without their ends) that
        were cut out."""
        cut = self._cut(data)
        if cut is None:
            return None
        read = self._known.get(cut[0])
        return None if read is None else (read, cut[1], cut[2])

    def keep(self, data: bytes, read: Read, names: list[bytes]) -> None:
        """Remember the head of a message that the parser has read, if such a message can be found again.

        `names` are those of all its headers.
        """
        cut = self._cut(data)
        if cut is None or len(cut[0]) > MAX_KEY_BYTES or names.count(b"content-length") != 1:
            return
        if _UNUSUAL.intersection(names) or len(cut[2]) != sum(map(names.count, self.varying)):
            return
        if len(self._known) >= MAX_HEADS:
            self._known.clear()
        self._known[cut[0]] = read

    def _cut(self, data: bytes) -> tuple[bytes, bytes, list[bytes]] | None:
        """The key, the body and the varying lines of a whole message; None when it is not one."""
        end = data.find(b"\r\n\r\n")
        found = _LENGTH.search(data, 0, end + 2)
        if found is None or len(data) - end - 4 != int(found[1]):
            return None
        start, stop = found.span(1)
        key = data[:start] + data[stop:end]
        lines: list[bytes] = self._lines(data, 0, end + 2)
        for line in lines:
            key = key.replace(b"\r\n" + line, b"")
        return key, data[end + 4 :], lines
