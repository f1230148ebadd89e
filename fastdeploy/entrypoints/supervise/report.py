"""What people see of a group that starts: a bar or lines while it loads, then one table."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm

from fastdeploy.observability.logs import CONSOLE

LINE_EVERY_S = 15.0

_console = logging.getLogger(CONSOLE)


@dataclass(frozen=True, slots=True)
class Row:
    """A server that is ready."""

    rank: int
    url: str
    metrics_url: str
    pid: int
    log_dir: str


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines, the first one the heading."""
    cells = [("rank", "url", "metrics", "pid", "logs")]
    cells += [(str(row.rank), row.url, f"{row.metrics_url}/metrics", str(row.pid), row.log_dir) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


class StartReport:
    """Follows the first start of all servers. On a terminal it is a bar, elsewhere a line now and then."""

    def __init__(
        self,
        n_servers: int,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._n_servers = n_servers
        self._clock = clock
        self._start_s = self._line_s = clock()
        self._stages: dict[str, str] = {}
        self._n_ready = 0
        stream = stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        if stream.isatty() if interactive is None else interactive:
            self._bar = tqdm(
                total=n_servers, desc="starting", unit="server", file=stream, dynamic_ncols=True, leave=False
            )

    @property
    def over(self) -> bool:
        """Whether all have been ready."""
        return self._n_ready == self._n_servers

    def on_stage(self, name: str, stage: str) -> None:
        """A server got this far."""
        self._stages[name] = stage.removeprefix("starting: ")
        slowest, its_stage = next(iter(self._stages.items()))
        if self._bar is not None:
            self._bar.set_postfix_str(f"{slowest}: {its_stage}")
        elif self._clock() - self._line_s >= LINE_EVERY_S:
            self._line_s = self._clock()
            waited_s = self._line_s - self._start_s
            _console.info(
                "%d of %d servers are ready after %.0f s; %s: %s",
                self._n_ready,
                self._n_servers,
                waited_s,
                slowest,
                its_stage,
            )

    def on_ready(self, name: str, url: str) -> None:
        """A server takes requests for the first time."""
        self._n_ready += 1
        self._stages.pop(name, None)
        if self._bar is not None:
            self._bar.set_postfix_str("")
            self._bar.update()
            self._bar.clear()  # the line below is not to be written behind it
        _console.info("%s is ready at %s after %.1f s", name, url, self._clock() - self._start_s)

    def on_all_ready(self, rows: Sequence[Row]) -> None:
        """The closing lines."""
        self.close()
        subject = "the server is" if self._n_servers == 1 else f"all {self._n_servers} servers are"
        _console.info("%s ready after %.1f s", subject, self._clock() - self._start_s)
        for line in table(rows):
            _console.info(line)

    def close(self) -> None:
        """Take an unfinished bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
