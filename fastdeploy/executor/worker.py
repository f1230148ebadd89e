"""A rank process: weights, pages, and a loop that turns plans into results."""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fastdeploy.errors import ConfigError, EngineStartError, FastDeployError
from fastdeploy.executor.process_memory import return_freed_memory
from fastdeploy.observability.logs import setup_logging
from fastdeploy.wire.child import receive_boot
from fastdeploy.wire.messages import (
    CancelPull,
    ForgetPulls,
    GroupStore,
    JoinGroup,
    LoadProgress,
    PullPages,
    RankAlive,
    RankBoot,
    RankCommand,
    RankEvent,
    RankFailed,
    RankReady,
    StepPlan,
    Stop,
    TransferCommand,
)

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from fastdeploy.config.schema import EngineConfig
    from fastdeploy.distributed.groups import Group
    from fastdeploy.runner.build import Report
    from fastdeploy.runner.model_runner import ModelRunner

_HEARTBEAT_S = 1.0
_MEETING_PATIENCE_S = 600.0

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
        self.transfers: queue.SimpleQueue[TransferCommand] = queue.SimpleQueue()  # a thread of its own carries them out
        threading.Thread(target=self._read, name="plans", daemon=True).start()

    def send(self, event: RankEvent) -> None:
        """Send one event; ends the process when the core is gone."""
        try:
            with self._lock:
                self._connection.send_bytes(_encode(event))
        except OSError:
            os._exit(0)

    def receive(self, patience_s: float | None = None) -> RankCommand:
        """The next command; raises queue.Empty when none comes in time."""
        return self._commands.get(timeout=patience_s)

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
            command: RankCommand = _decode(data)
            if isinstance(command, PullPages | CancelPull | ForgetPulls):
                self.transfers.put(command)
            else:
                self._commands.put(command)


def main() -> None:
    """Entry point of the process."""
    boot = receive_boot(RankBoot)
    setup_logging(boot.config.log_dir, f"rank{boot.number}", console=False)
    faulthandler.enable()
    link = CoreLink(boot.connection_fd)
    heart = _Heart(link)
    try:
        _serve(boot, link, heart)
    except FastDeployError as error:
        log.error("%s", error)
        link.send(RankFailed(type(error).__name__, str(error)))
    except Exception as error:
        log.exception("rank failed")
        link.send(RankFailed("EngineDeadError", f"rank {boot.number}: {type(error).__name__}: {error}"))


def _serve(boot: RankBoot, link: CoreLink, heart: _Heart) -> None:
    import torch

    from fastdeploy.distributed import groups, topology
    from fastdeploy.runner.build import build_runner

    config, parallel = boot.config, boot.config.parallel
    if config.n_threads is not None:
        torch.set_num_threads(config.n_threads)
    if config.model.device == "cuda":
        _take_gpu(topology.local_device(parallel, boot.number), boot.number)
    started = time.monotonic()
    report = _progress_reporter(link)
    where = topology.position(parallel, boot.number)
    meeting = None
    if where.group_size > 1:
        store = None
        if where.group_rank == 0:
            store, host, port = groups.open_store(parallel, boot.number)
            link.send(GroupStore(host, port))
        meeting = _Meeting(config, boot.number, link, report, store)
    exchange = os.environ.get("FD_ALL_TO_ALL") or None
    runner, stages_s = build_runner(config, report, number=boot.number, meeting=meeting, exchange=exchange)
    return_freed_memory()
    warm_s = time.monotonic()
    runner.warm_up()
    stages_s = {"torch": round(started - _process_start_s(), 2), **stages_s}
    if config.model.device == "cuda":
        stages_s["warm-up"] = round(time.monotonic() - warm_s, 2)
    endpoint = None
    if runner.memory is not None:
        from fastdeploy.executor.pulls import Pulls

        pulls = Pulls(config, boot.number, runner.memory, runner.owner, link.send)
        endpoint = pulls.endpoint
        runner.lend(link.send)
        threading.Thread(target=pulls.serve, args=(link.transfers,), name="pulls", daemon=True).start()
    link.send(RankReady(runner.n_pages, runner.kv_bytes, runner.weight_bytes, stages_s, endpoint))
    heart.runner = runner
    _run_steps(runner, link, config.model.device == "cuda")


def _run_steps(runner: ModelRunner, link: CoreLink, on_gpu: bool) -> None:
    """Launch plans as they come, until something else comes. A GPU computes by itself: there a thread waits for it."""
    answers = _Answers(link) if on_gpu else None
    while True:
        while (answers is None or answers.idle) and not link.has_more() and runner.use_idle_time():
            continue
        command = link.receive()
        if not isinstance(command, StepPlan):
            return
        if answers is not None:
            answers.put(runner.launch(command))
        else:
            link.send(runner.launch(command)())


class _Answers:
    """Waits for launched steps, in order, in a thread, so that the next one can be launched meanwhile."""

    def __init__(self, link: CoreLink) -> None:
        self._link = link
        self._launched: queue.SimpleQueue[Callable[[], RankEvent]] = queue.SimpleQueue()
        self._n_launched = 0  # written by the one thread, `_n_sent` by the other
        self._n_sent = 0
        threading.Thread(target=self._send_all, name="answers", daemon=True).start()

    @property
    def idle(self) -> bool:
        """Whether the device has nothing to do."""
        return self._n_launched == self._n_sent

    def put(self, result: Callable[[], RankEvent]) -> None:
        """A step was launched; `result` waits for it."""
        self._n_launched += 1
        self._launched.put(result)

    def _send_all(self) -> None:
        try:
            while True:
                self._link.send(self._launched.get()())
                self._n_sent += 1
        except Exception as error:
            log.exception("rank failed")
            self._link.send(RankFailed("EngineDeadError", f"{type(error).__name__}: {error}"))


def _take_gpu(index: int, number: int) -> None:
    """Compute on this machine's GPU `index` from here on."""
    import torch

    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {number} needs GPU {index} of its machine, which shows {torch.cuda.device_count()}; check "
            f"nvidia-smi and CUDA_VISIBLE_DEVICES, or lower --tensor-parallel-size x --data-parallel-size"
        )
    torch.cuda.set_device(index)


class _Meeting:
    """Where the ranks of the group meet, which the core says as soon as it knows; implements groups.Meeting."""

    def __init__(
        self, config: EngineConfig, number: int, link: CoreLink, report: Report, store: TCPStore | None
    ) -> None:
        """`store`: of the rank that opened it."""
        self._config = config
        self._number = number
        self._link = link
        self._report = report
        self._store = store
        self._address: JoinGroup | None = None

    def store(self) -> TCPStore:
        from fastdeploy.distributed import groups

        if self._store is None:
            self._address = self._wait_for_address()
            self._store = groups.reach_store(self._number, self._address.host, self._address.port)
        return self._store

    def join(self) -> Group:
        import torch

        from fastdeploy.distributed import groups

        store = self.store()
        address = self._address or self._wait_for_address()
        device = torch.device(self._config.model.device)
        if device.type == "cuda":  # NCCL wants to know which
            device = torch.device("cuda", torch.cuda.current_device())
        return groups.join(
            self._config.parallel,
            self._number,
            device,
            address.host,
            address.port,
            store,
            on_wait=lambda n_came, n_ranks: self._report("group", n_came, n_ranks, "ranks"),
        )

    def _wait_for_address(self) -> JoinGroup:
        deadline_s = time.monotonic() + _MEETING_PATIENCE_S
        while time.monotonic() < deadline_s:
            try:
                command = self._link.receive(1.0)
            except queue.Empty:
                self._report("group", 0, 0, "ranks")
                continue
            if isinstance(command, JoinGroup):
                return command
            if isinstance(command, Stop):
                raise EngineStartError(f"rank {self._number}: stopped before its group met")
            raise EngineStartError(f"rank {self._number}: got a {type(command).__name__} before its group met")
        raise EngineStartError(
            f"rank {self._number}: waited {_MEETING_PATIENCE_S:.0f} s to hear where the ranks of its group meet; the "
            f"first of them did not start: see the log of rank 0"
        )


class _Heart:
    """Tells the core once a second that this process runs, and what `runner` has done once there is one."""

    def __init__(self, link: CoreLink) -> None:
        self.runner: ModelRunner | None = None
        self._link = link
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        n_told = 0
        while True:
            n_done = self.runner.layers_done() if self.runner else 0
            # Adding up the rows is most of what an idle rank would do.
            n_rows = self.runner.rows_of_experts() if self.runner and n_done != n_told else {}
            balancer = self.runner.balancer if self.runner and n_done != n_told else None
            self._link.send(RankAlive(n_done, n_rows, balancer.report() if balancer else None))
            n_told = n_done
            time.sleep(_HEARTBEAT_S)


def _progress_reporter(link: CoreLink) -> Report:
    def report(stage: str, done: int, total: int, unit: str) -> None:
        link.send(LoadProgress(stage, done, total, unit))

    return report


def _process_start_s() -> float:
    """Monotonic time at which this process was created, from the kernel."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
