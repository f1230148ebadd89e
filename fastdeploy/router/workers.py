"""Several processes behind one port: the parent holds the sockets, starts the workers and starts them again.

Every worker has a listening socket of its own on the same port, and the kernel spreads connections over them. The
sockets are the parent's: while a worker is away its new connections wait for the next one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fastdeploy.entrypoints.openai.server import BACKLOG, bind
from fastdeploy.errors import ConfigError
from fastdeploy.observability.logs import CONSOLE
from fastdeploy.router.shared_loads import SharedLoads

CONSOLE_LOGGER = logging.getLogger(CONSOLE)
MAX_WORKERS = 64
LONGEST_PAUSE_S = 5.0
LONG_LIFE_S = 30.0  # after which a death is not counted with the ones before
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@dataclass(frozen=True, slots=True)
class Group:
    """What one worker has of the whole: its number, the sockets of the others, the loads that all share."""

    worker: int
    n_workers: int
    folder: Path
    loads: SharedLoads


RunWorker = Callable[[Group, socket.socket], int]


@dataclass(slots=True)
class _Worker:
    """One process and when it may start again. `pid` is 0 while there is none."""

    pid: int = 0
    started_s: float = 0.0
    n_deaths: int = 0
    due_s: float = field(default_factory=time.monotonic)


def bind_group(stack: ExitStack, host: str, port: int, n: int) -> list[socket.socket]:
    """So many listening sockets on one port. Raises `ConfigError` when somebody else has it."""
    first = stack.enter_context(bind(host, port, "--port"))  # not shared yet: a busy port is an error
    sockets = [first]
    if n > 1:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for _ in range(n - 1):
        sock = stack.enter_context(socket.socket(first.family, first.type))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind(first.getsockname())
            sock.listen(BACKLOG)
        except OSError as exc:
            raise ConfigError(f"--workers {n}: cannot share port {first.getsockname()[1]}: {exc.strerror}") from exc
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def run_workers(sockets: list[socket.socket], run: RunWorker) -> int:
    """Keeps a worker on each socket until a signal comes, which is passed on; returns the worst of their exit codes."""
    with tempfile.TemporaryDirectory(prefix="fd-router-") as name:
        folder = Path(name)
        loads = SharedLoads(len(sockets), folder / "lock")
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return _watch(sockets, run, folder, loads)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _watch(sockets: list[socket.socket], run: RunWorker, folder: Path, loads: SharedLoads) -> int:
    workers = [_Worker() for _ in sockets]
    stopping, worst = False, 0
    while not stopping or any(worker.pid for worker in workers):
        now_s = time.monotonic()
        for i, worker in enumerate(workers):
            if not worker.pid and not stopping and worker.due_s <= now_s:
                worker.pid, worker.started_s = _start(Group(i, len(workers), folder, loads), sockets[i], run), now_s
        came = signal.sigtimedwait(_SIGNALS, 0.5)
        if came is not None and came.si_signo != signal.SIGCHLD:
            stopping = True
            for worker in workers:
                if worker.pid:
                    os.kill(worker.pid, signal.SIGTERM)
        for i, worker in enumerate(workers):
            code = _ended(worker)
            if code is None:
                continue
            loads.clear(i)
            if stopping:
                worst = max(worst, code)
            else:
                _plan_restart(i, worker, code)
    return worst


def _start(group: Group, sock: socket.socket, run: RunWorker) -> int:
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        code = run(group, sock)
    except BaseException:
        logging.getLogger(__name__).exception("worker %d failed", group.worker)
    finally:
        os._exit(code)


def _ended(worker: _Worker) -> int | None:
    """The exit code of a worker that has just ended; that of a killed one is 1."""
    if not worker.pid:
        return None
    pid, status = os.waitpid(worker.pid, os.WNOHANG)
    if not pid:
        return None
    worker.pid = 0
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 1


def _plan_restart(i: int, worker: _Worker, code: int) -> None:
    now_s = time.monotonic()
    worker.n_deaths = worker.n_deaths + 1 if now_s - worker.started_s < LONG_LIFE_S else 1
    pause_s = min(0.1 * 2 ** (worker.n_deaths - 1), LONGEST_PAUSE_S)
    worker.due_s = now_s + pause_s
    CONSOLE_LOGGER.error("worker %d ended with code %d; it starts again in %.1f s", i, code, pause_s)
