"""Engine core of one data-parallel rank: the only writer of its requests and pages.

One loop: take commands, commit results, plan the next step while the ranks compute the one before, send what came out.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
from collections import deque

import zmq

from fastdeploy.config.schema import with_measured_pages
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.engine.step import PlannedStep
from fastdeploy.errors import EngineDeadError, FastDeployError, RequestError
from fastdeploy.executor.executor import Executor
from fastdeploy.observability.logs import setup_logging
from fastdeploy.wire.channel import CoreChannel
from fastdeploy.wire.child import receive_boot
from fastdeploy.wire.messages import (
    Abort,
    CoreBoot,
    EngineFailed,
    Event,
    Hello,
    LoadProgress,
    Ready,
    Shutdown,
    Status,
    StepOutput,
    Submit,
    TokenDelta,
)

_STATUS_EVERY_S = 1.0
_START_PATIENCE_S = 600.0
_HELLO_PATIENCE_MS = 2000

log = logging.getLogger("fastdeploy.core")


class EngineCore:
    """Scheduler, ranks and front ends of one replica, and the loop that joins them."""

    def __init__(self, boot: CoreBoot) -> None:
        self.config = boot.config
        self.channel = CoreChannel(boot.endpoint, boot.secret_key, boot.public_key)
        self.front_ends: set[bytes] = set()
        self.executor = Executor(boot.config)
        self.in_flight: deque[PlannedStep] = deque()
        self._busy_since_s = 0.0
        self._status_due_s = 0.0

    def start(self) -> None:
        """Wait for the ranks; afterwards requests are served."""
        rank = self.executor.wait_ready(self._on_progress, _START_PATIENCE_S)
        self.config = with_measured_pages(self.config, rank.n_pages)
        self.scheduler = Scheduler(self.config)
        self.ready = Ready(rank.n_pages, rank.kv_bytes, rank.weight_bytes, rank.stages_s)
        self._broadcast(self.ready)

    def run(self) -> None:
        """Serve until told to shut down. Raises when the ranks fail."""
        poller = zmq.Poller()
        poller.register(self.channel.socket, zmq.POLLIN)
        for connection in self.executor.connections:
            poller.register(connection.fileno(), zmq.POLLIN)
        while True:
            wait_s = max(self._status_due_s - time.monotonic(), 0)
            poller.poll(int(wait_s * 1000) + 1)
            if not self._take_commands():
                return
            self._send(self.scheduler.expire(time.time()))
            for result in self.executor.receive():
                self._send(self.scheduler.commit(self.in_flight.popleft(), result, time.time()))
            was_busy = self._busy_since_s > 0
            self._plan_ahead()
            if time.monotonic() >= self._status_due_s or was_busy != (self._busy_since_s > 0):
                self._broadcast(self._status())
                self._status_due_s = time.monotonic() + _STATUS_EVERY_S

    def _plan_ahead(self) -> None:
        while len(self.in_flight) < self.config.scheduler.steps_in_flight:
            step = self.scheduler.plan(time.time())
            if step is None:
                break
            self.executor.send(step.plan)
            self.in_flight.append(step)
        if not self.in_flight:
            self._busy_since_s = 0.0
        elif not self._busy_since_s:
            self._busy_since_s = time.monotonic()

    def _take_commands(self) -> bool:
        """Apply what front ends sent; False when one of them wants the engine to stop."""
        for client, command in self.channel.receive_all():
            match command:
                case Submit():
                    self._submit(client, command)
                case Abort(request_ids):
                    self._send(self.scheduler.abort(request_ids))
                case Hello():
                    self.front_ends.add(client)
                    self._to(client, self.ready)
                    self._to(client, self._status())
                case Shutdown():
                    return False
        return True

    def _submit(self, client: bytes, command: Submit) -> None:
        try:
            self.scheduler.submit(command, client, time.time())
        except RequestError as error:
            delta = TokenDelta(command.request_id, [], "error", error=error.message, error_kind=type(error).__name__)
            self._to(client, StepOutput([delta]))

    def _status(self) -> Status:
        return self.scheduler.status(self.executor.stalled_s(self._busy_since_s) if self._busy_since_s else 0.0)

    def fail(self, error: FastDeployError) -> None:
        """Tell every front end why this engine ends, also one whose Hello has not been read yet."""
        if not self.front_ends:
            self.channel.socket.poll(_HELLO_PATIENCE_MS)
            self._meet_front_ends()
        self._broadcast(EngineFailed(type(error).__name__, str(error)))

    def stop(self) -> None:
        """End ranks and close the channel."""
        self.executor.stop()
        self.channel.close()

    def _on_progress(self, progress: LoadProgress) -> None:
        self._meet_front_ends()
        self._broadcast(progress)

    def _meet_front_ends(self) -> None:
        """Before requests are served, Hello is all that front ends say."""
        for client, command in self.channel.receive_all():
            if isinstance(command, Hello):
                self.front_ends.add(client)

    def _send(self, deltas: dict[bytes, list[TokenDelta]]) -> None:
        for client, of_client in deltas.items():
            self._to(client, StepOutput(of_client))

    def _broadcast(self, event: Event) -> None:
        for client in list(self.front_ends):
            self._to(client, event)

    def _to(self, client: bytes, event: Event) -> None:
        if not self.channel.send(client, event):
            self.front_ends.discard(client)
            self.scheduler.drop_client(client)


def main() -> int:
    """Entry point of the process."""
    boot = receive_boot(CoreBoot)
    setup_logging(boot.config.log_dir, f"core{boot.config.parallel.data_rank}", console=False)
    faulthandler.enable()
    core = EngineCore(boot)
    try:
        core.start()
        core.run()
    except FastDeployError as error:
        log.error("%s", error)
        core.fail(error)
        return 1
    except Exception as error:
        log.exception("engine core failed")
        core.fail(EngineDeadError(f"engine core: {type(error).__name__}: {error}"))
        return 1
    finally:
        core.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
