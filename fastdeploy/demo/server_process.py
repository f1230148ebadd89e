"""Servers of this package as child processes: on ports they choose themselves, watched, stopped in order."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from fastdeploy.errors import EngineDeadError, EngineStartError

MODULE = "fastdeploy.entrypoints.openai.multi_api_server"
STOP_PATIENCE_S = 30.0

_ROW = re.compile(r"\s(\d+) +(http://\S+) +(http://\S+/metrics) ")  # of the table shown when all are ready
_N_LINES_KEPT = 200
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one of the servers answers, and where it serves its metrics."""

    url: str
    metrics_url: str


class ServerProcess:
    """`python -m fastdeploy.entrypoints.openai.multi_api_server ARGV`; as a context it ends with the block.

    `on_line` gets every line the servers write, from a thread of this object.
    """

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], n_servers: int, on_line: Callable[[str], None]
    ) -> None:
        self._n_servers = n_servers
        self._lines: deque[str] = deque(maxlen=_N_LINES_KEPT)
        self._on_line = on_line
        self._endpoints: dict[int, Endpoint] = {}
        self._ready = threading.Event()
        libc = ctypes.CDLL(None)
        parent_pid = os.getpid()

        def end_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent_pid:  # it died before the line above
                os._exit(1)

        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(environ),
            preexec_fn=end_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="server output", daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None and self._process.poll() is None:  # what went wrong matters, not how the server ends
            self._end()
        elif kind is None:
            self.stop()

    def wait_ready(self, patience_s: float, on_wait: Callable[[float], None] = lambda _: None) -> list[Endpoint]:
        """The servers, by rank, once all take requests; `on_wait` gets the seconds waited, several times a second.

        Raises EngineStartError with the server's last lines when it ends or takes longer.
        """
        start_s = time.monotonic()
        while not self._ready.wait(_POLL_S):
            waited_s = time.monotonic() - start_s
            on_wait(waited_s)
            if self._process.poll() is not None:
                self._reader.join(_POLL_S)
                status = self._process.returncode
                raise EngineStartError(f"the server ended with status {status} while starting{self.last_lines()}")
            if waited_s > patience_s:
                raise EngineStartError(f"the server was not ready after {waited_s:.0f} s{self.last_lines()}")
        return [self._endpoints[rank] for rank in sorted(self._endpoints)]

    def stop(self) -> None:
        """Tell the server to end and wait. Raises EngineDeadError unless it ends in order: status 0, in time."""
        status_before = self._process.poll()
        self._end()
        status = self._process.returncode
        if status_before is not None or status != 0:
            when = "by itself" if status_before is not None else f"after SIGTERM, within {STOP_PATIENCE_S:.0f} s"
            raise EngineDeadError(f"the server ended {when} with status {status}, expected 0{self.last_lines()}")

    def last_lines(self, n_lines: int = 15) -> str:
        """What the server wrote last, as text to put behind a message."""
        lines = list(self._lines)[-n_lines:]
        return "; its last lines:\n" + "\n".join(lines) if lines else ""

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_PATIENCE_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                text = line.rstrip("\n")
                self._lines.append(text)
                self._on_line(text)
                if (match := _ROW.search(text)) is not None:
                    self._endpoints[int(match[1])] = Endpoint(match[2], match[3])
                    if len(self._endpoints) == self._n_servers:
                        self._ready.set()
