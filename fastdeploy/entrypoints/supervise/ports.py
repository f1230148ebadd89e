"""The ports of a group of servers: how many, which, and whether they can be had. Nothing is started before that."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from fastdeploy.config.resolve import Problems
from fastdeploy.entrypoints.openai.server import bind
from fastdeploy.errors import ConfigError

FIRST_PORT = 8000
ANY = 0  # the server takes a free one and announces it
LEFT_OUT = (-1,)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A port that some process will bind, and the flag it comes from."""

    flag: str
    port: int
    host: str


def one_per_server(
    flag: str, given: Sequence[int], default: Sequence[int], problems: Problems, if_wrong: int = ANY
) -> Sequence[int]:
    """`given`, or `default` when it is left out or -1, or `if_wrong` for each when `given` is a problem by itself."""
    if not given or tuple(given) == LEFT_OUT:
        return default
    shown = ",".join(map(str, given))
    counted = problems.check(
        len(given) == len(default),
        f"{flag} {shown}: Number of ports must match num-servers: {len(given)} given, {len(default)} expected",
    )
    valid = problems.check(all(0 <= port <= 65535 for port in given), f"{flag} {shown}: every port must be in 0..65535")
    return given if counted and valid else (if_wrong,) * len(default)


def default_ports(n_servers: int) -> tuple[int, ...]:
    """8000, 8002, 8004, ..."""
    return tuple(FIRST_PORT + 2 * i for i in range(n_servers))


def check_distinct(wanted: Iterable[Wanted], problems: Problems) -> None:
    """No port twice."""
    seen: dict[int, Wanted] = {}
    for one in wanted:
        if one.port == ANY:
            continue
        other = seen.setdefault(one.port, one)
        flags = one.flag if other.flag == one.flag else f"{other.flag} and {one.flag}"
        problems.check(other is one, f"{flags}: port {one.port} is given twice")


def check_free(wanted: Iterable[Wanted], problems: Problems) -> None:
    """Bind them all for a moment, as their owners will."""
    with ExitStack() as stack:
        held: dict[tuple[str, int], socket.socket] = {}
        for one in wanted:
            if one.port == ANY or (one.host, one.port) in held:
                continue
            try:
                held[one.host, one.port] = stack.enter_context(bind(one.host, one.port, one.flag))
            except ConfigError as exc:
                problems.check(str(exc) in problems.lines, str(exc))  # a wrong --host is one problem
