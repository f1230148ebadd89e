"""Main of one server of a group: an api_server that ends with its supervisor and reports to it.

Its standard input is a pipe that the supervisor holds open: when the supervisor is gone, however it went, the pipe ends
and the server with it. The kernel kills the server as well, which reaches even a stopped process. SIGTERM stays what it
is to an api_server: the supervisor drains its servers with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import BinaryIO

from fastdeploy.entrypoints.supervise.announce import ANNOUNCE_FD, Announcement, encode_announcement

_LIFELINE = 0  # standard input
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serves with the flags of the command line; returns the api_server's exit status."""
    number = os.environ.pop(ANNOUNCE_FD, None)  # the engine's processes are not to see it
    if number is None:
        print(f"fastdeploy: error: {ANNOUNCE_FD} is not set: multi_api_server starts this program", file=sys.stderr)
        return 2
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_supervisor, name="lifeline", daemon=True).start()
    os.set_inheritable(int(number), False)
    with os.fdopen(int(number), "wb", buffering=0) as pipe:
        from fastdeploy.entrypoints.openai import api_server

        return api_server.main(announce=lambda announcement: _tell(pipe, announcement))


def _tell(pipe: BinaryIO, announcement: Announcement) -> None:
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone, and this process about to be
        pipe.write(encode_announcement(announcement))


def _end_with_supervisor() -> None:
    while os.read(_LIFELINE, 1):
        continue
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
