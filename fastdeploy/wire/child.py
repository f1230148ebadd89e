"""Child processes that cannot outlive their parent.

A child is `python -m MODULE` with a pipe as its standard input. The parent writes one boot message and keeps the pipe
open: it is the child's lifeline. When the parent is gone, however it went, the pipe ends and the child ends with it.
The kernel kills the child as well when the thread that started it ends, which reaches even a stopped process: start
children from a thread that outlives them. Children ignore SIGINT and SIGTERM: the root of the tree drains and then
stops them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

Boot = TypeVar("Boot", bound=msgspec.Struct)

_LENGTH = struct.Struct("<I")  # bytes of the boot message
_LIFELINE = 0  # standard input
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class Child:
    """A running child: `process`, its `name` for messages, and the file that takes its standard output and error."""

    def __init__(
        self,
        name: str,
        module: str,
        boot: msgspec.Struct,
        output: Path,
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as sink:
            self._output_start = sink.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                preexec_fn=_die_with_parent,
                env={**os.environ, **(env or {})},
            )
        message = msgspec.msgpack.encode(boot)
        assert self.process.stdin is not None
        self.process.stdin.write(_LENGTH.pack(len(message)) + message)
        self.process.stdin.flush()

    def describe_death(self, n_lines: int = 10) -> str:
        """How the child ended and the last lines it wrote."""
        code = self.process.poll()
        if code is None:
            how = "is alive"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        lines = self.last_lines(n_lines)
        return f"{self.name} (pid {self.process.pid}) {how}" + (
            f"; its last lines in {self.output}:\n{lines}" if lines else ""
        )

    def last_lines(self, n_lines: int) -> str:
        """The end of what this child wrote."""
        with self.output.open("rb") as written:
            written.seek(max(self._output_start, written.seek(0, os.SEEK_END) - 65536))
            return "\n".join(written.read().decode(errors="replace").splitlines()[-n_lines:])

    def cut(self) -> None:
        """Cut the lifeline: the child ends by itself, at once. Does not wait."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stop(self, patience_s: float = 5.0) -> None:
        """Cut the lifeline, wait, and kill what does not end."""
        self.cut()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _die_with_parent() -> None:
    """Between fork and exec, so that a child which is stopped before it runs a line of its own is reached as well."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def receive_boot(kind: type[Boot]) -> Boot:
    """In the child: the boot message; from here on the process ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (length,) = _LENGTH.unpack(_read_exactly(_LIFELINE, _LENGTH.size))
    boot = msgspec.msgpack.decode(_read_exactly(_LIFELINE, length), type=kind)
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    return boot


def _read_exactly(fd: int, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        part = os.read(fd, n_bytes - len(data))
        if not part:
            os._exit(1)  # the parent died while starting us
        data += part
    return data


def _end_with_parent() -> None:
    while os.read(_LIFELINE, 1):
        continue
    os._exit(0)
