"""A rank process: weights, pages, and a loop that turns plans into results."""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from fastdeploy.errors import FastDeployError
from fastdeploy.observability.logs import setup_logging
from fastdeploy.wire.child import receive_boot
from fastdeploy.wire.messages import (
    LoadProgress,
    RankAlive,
    RankBoot,
    RankCommand,
    RankEvent,
    RankFailed,
    RankReady,
    StepPlan,
)

_HEARTBEAT_S = 1.0

log = logging.getLogger("fastdeploy.rank")
_decode = msgspec.msgpack.Decoder(RankCommand).decode
_encode = msgspec.msgpack.Encoder().encode


class CoreLink:
    """The rank's end of the socket pair to its engine core; several threads may send.

    A thread takes in what comes, also while a step runs: a plan with a long prompt is more than a socket buffers, and
    a core that waits for room serves nobody.
    """

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._lock = threading.Lock()
        self._commands: queue.SimpleQueue[RankCommand] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="plans", daemon=True).start()

    def send(self, event: RankEvent) -> None:
        """Send one event; ends the process when the core is gone."""
        try:
            with self._lock:
                self._connection.send_bytes(_encode(event))
        except OSError:
            os._exit(0)

    def receive(self) -> RankCommand:
        """The next command."""
        return self._commands.get()

    def has_more(self) -> bool:
        """Whether a command is waiting."""
        return not self._commands.empty()

    def _read(self) -> None:
        """Ends the process when the core is gone."""
        while True:
            try:
                data = self._connection.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)
            self._commands.put(_decode(data))


def main() -> None:
    """Entry point of the process."""
    boot = receive_boot(RankBoot)
    setup_logging(boot.config.log_dir, f"rank{boot.number}", console=False)
    faulthandler.enable()
    link = CoreLink(boot.connection_fd)
    try:
        _serve(boot, link)
    except FastDeployError as error:
        log.error("%s", error)
        link.send(RankFailed(type(error).__name__, str(error)))
    except Exception as error:
        log.exception("rank failed")
        link.send(RankFailed("EngineDeadError", f"rank {boot.number}: {type(error).__name__}: {error}"))


def _serve(boot: RankBoot, link: CoreLink) -> None:
    import torch

    from fastdeploy.runner.build import build_runner

    if boot.config.n_threads is not None:
        torch.set_num_threads(boot.config.n_threads)
    started = time.monotonic()
    report = _progress_reporter(link)
    runner, stages_s = build_runner(boot.config, report)
    stages_s = {"torch": round(started - _process_start_s(), 2), **stages_s}
    link.send(RankReady(runner.n_pages, runner.kv_bytes, runner.weight_bytes, stages_s))
    threading.Thread(target=_beat, args=(link, runner.layers_done), name="heartbeat", daemon=True).start()
    # A plan that is already here is launched before the previous one's result is waited for.
    pending: deque[Callable[[], RankEvent]] = deque()
    while True:
        if not pending or (len(pending) < 2 and link.has_more()):
            command = link.receive()
            if not isinstance(command, StepPlan):
                return
            pending.append(runner.launch(command))
        else:
            link.send(pending.popleft()())


def _beat(link: CoreLink, layers_done: Callable[[], int]) -> None:
    while True:
        link.send(RankAlive(layers_done()))
        time.sleep(_HEARTBEAT_S)


def _progress_reporter(link: CoreLink) -> Callable[[str, int, int, str], None]:
    def report(stage: str, done: int, total: int, unit: str) -> None:
        link.send(LoadProgress(stage, done, total, unit))

    return report


def _process_start_s() -> float:
    """Monotonic time at which this process was created, from the kernel."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
