"""One running server as an operating system process: its command, its lifeline, its announcements, its last lines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from fastdeploy.entrypoints.supervise.announce import ANNOUNCE_FD, Announcement, decode_announcement

ERROR_PREFIX = "fastdeploy: error: "
N_LAST_LINES = 10
MAX_TAIL_BYTES = 65536


class ServerProcess:
    """A server that `child_main`, or a program like it, runs. To be made by the thread of the event loop.

    It is a process group of its own: Ctrl-C reaches the supervisor alone. What it prints goes to `output`.
    Raises OSError when it cannot be started.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], output: Path) -> None:
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self._pipe, write_end = os.pipe()
        try:
            with output.open("ab") as sink:
                self._output_start = sink.tell()
                self._popen = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.PIPE,  # the lifeline: nothing is ever written
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_end,),
                    process_group=0,
                    env={**environ, ANNOUNCE_FD: str(write_end)},
                )
        except OSError:
            os.close(self._pipe)
            raise
        finally:
            os.close(write_end)

    @property
    def pid(self) -> int:
        """Of the front end."""
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """Exit status, the negative number of the signal that killed it, or None while it lives."""
        return self._popen.poll()

    async def announcements(self) -> AsyncGenerator[Announcement, None]:
        """What it tells, until its end of the pipe closes. To be read once."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._pipe, "rb", buffering=0)
        )
        try:
            async for line in reader:
                yield decode_announcement(line)
        finally:
            transport.close()

    async def ended(self) -> None:
        """Waits until it is gone."""
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        fd = os.pidfd_open(self.pid)
        loop.add_reader(fd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        self._popen.wait()
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def send(self, number: signal.Signals) -> None:
        """A signal, unless it is gone."""
        self._popen.send_signal(number)

    def describe_death(self) -> str:
        """`(pid 1) was killed by SIGKILL; its last lines in FILE: ...`."""
        code = self.status or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        lines = self._tail()[-N_LAST_LINES:]
        last = f"; its last lines in {self.output}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""
        return f"(pid {self.pid}) {how}{last}"

    def errors(self) -> list[str]:
        """The errors that it ended with, one a line, as its command shows them."""
        return [line.removeprefix(ERROR_PREFIX) for line in self._tail() if line.startswith(ERROR_PREFIX)]

    def _tail(self) -> list[str]:
        """The last lines of this life."""
        with self.output.open("rb") as written:
            written.seek(max(self._output_start, written.seek(0, os.SEEK_END) - MAX_TAIL_BYTES))
            return written.read().decode(errors="replace").splitlines()
