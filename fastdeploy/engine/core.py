"""Engine core of one data-parallel rank: the only writer of its requests and pages.

One loop: take commands, commit results, plan the next step while the ranks compute the one before, send what came out.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
from collections import deque

import msgspec
import zmq

from fastdeploy.config.schema import with_measured_pages
from fastdeploy.engine.group import CoreGroup
from fastdeploy.engine.pairing import PairingLink
from fastdeploy.engine.rearranging import RearrangeClock
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.engine.step import PlannedStep, is_decode, trimmed
from fastdeploy.errors import EngineDeadError, FastDeployError, InvalidRequest, RequestError
from fastdeploy.executor.executor import Executor
from fastdeploy.observability.experts import together
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
    Rearrange,
    Shutdown,
    Siblings,
    Starting,
    Status,
    StepAgreement,
    StepOutput,
    StepPlan,
    Submit,
    TokenDelta,
    Withdraw,
    Withdrawn,
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
        self.group = CoreGroup(boot.config, boot.group) if boot.group else None
        self.pairing: PairingLink | None = None
        self.in_flight: deque[PlannedStep] = deque()
        self.proposed: PlannedStep | None = None  # voted for; the ranks get it when all cores have voted
        self.rearranging = RearrangeClock(boot.config, time.monotonic())
        self._told_to_stop = False
        self._busy_since_s = 0.0
        self._status_due_s = 0.0

    def start(self) -> None:
        """Wait for the ranks; afterwards requests are served."""
        rank = self.executor.wait_ready(self._on_progress, _START_PATIENCE_S, self._while_ranks_load)
        self.config = with_measured_pages(self.config, rank.n_pages)
        self.scheduler = Scheduler(self.config)
        ports = []
        if self.config.transfer.role != "mixed":
            self.pairing = PairingLink(self.config, self.scheduler, self.executor)
            ports = [self.pairing.port]
        self.ready = Ready(rank.n_pages, rank.kv_bytes, rank.weight_bytes, rank.stages_s, ports)
        self._broadcast(self.ready)

    def run(self) -> None:
        """Serve until told to shut down. Raises when the ranks fail, or another core of the group."""
        poller = zmq.Poller()
        poller.register(self.channel.socket, zmq.POLLIN)
        for connection in self.executor.connections:
            poller.register(connection.fileno(), zmq.POLLIN)
        for socket in self.group.sockets if self.group else ():
            poller.register(socket, zmq.POLLIN)
        if self.pairing is not None:
            self.pairing.register(poller)
        while not self._stopped():
            wait_s = max(self._status_due_s - time.monotonic(), 0)
            if self.pairing is not None:
                wait_s = min(wait_s, self.pairing.pause_s)
            poller.poll(int(wait_s * 1000) + 1)
            self.turn()

    def turn(self) -> None:
        """Take in all that has arrived, plan, and send what came out; does not wait."""
        self._take_commands()
        self._send_all(self.scheduler.expire(time.time()))
        for result in self.executor.receive():
            self._send_all(self.scheduler.commit(self.in_flight.popleft(), result, time.time()))
        if self.pairing is not None:
            self._send(self.pairing.turn())
        was_busy = self._busy_since_s > 0
        if self.group is None:
            self._plan_ahead()
        else:
            self._plan_together(self.group)
        if self.pairing is not None:
            self._send(self.pairing.flush())
        self._note_busy()
        if time.monotonic() >= self._status_due_s or was_busy != (self._busy_since_s > 0):
            if self.config.parallel.data > 1:  # else a stopped rank may go on: only /health turns false
                self.executor.check_alive()
            self._broadcast(self._status())
            self._status_due_s = time.monotonic() + _STATUS_EVERY_S

    def _while_ranks_load(self) -> None:
        """Called several times a second."""
        if time.monotonic() >= self._status_due_s:
            self._meet_front_ends()
            self._broadcast(Starting())
            self._status_due_s = time.monotonic() + _STATUS_EVERY_S
        self._bring_ranks_together()

    def _bring_ranks_together(self) -> None:
        """While the ranks load: pass on where those of one process group meet, within this replica or to all cores."""
        store, self.executor.store = self.executor.store, None
        if self.group is None:
            if store is not None:
                self.executor.join_group(store)
            return
        self.group.advance()  # joins, if it has not yet: the hub passes over what strangers say
        if store is not None:
            self.group.open_store(store)
        self.group.check_complete(self._on_progress)
        if self.group.store is not None:
            self.executor.join_group(self.group.store)
            self.group.store = None

    def _plan_ahead(self) -> None:
        while len(self.in_flight) < self.config.scheduler.steps_in_flight:
            step = self.scheduler.plan(time.time(), even_if_empty=self.rearranging.asked)
            if step is None:
                break
            self.executor.send(self._alone(self._final(step)))
            self.in_flight.append(step)

    def _plan_together(self, group: CoreGroup) -> None:
        """Vote for the next step when there is work, here or elsewhere; start it when all cores have voted."""
        group.advance()
        agreement = group.take_agreement()
        if agreement is not None and self.proposed is not None:
            step = trimmed(self.proposed, agreement.n_tokens_d[self.config.parallel.data_rank])
            self.proposed = None
            if agreement.rearrange:
                self.rearranging.done(time.monotonic())
            self.executor.send(msgspec.structs.replace(self._final(step), agreement=agreement))
            self.in_flight.append(step)
        if self.proposed is not None or len(self.in_flight) >= self.config.scheduler.steps_in_flight:
            return
        self.proposed = self.scheduler.plan(time.time(), even_if_empty=group.step_open or self.rearranging.asked)
        if self.proposed is not None:
            plan = self.proposed.plan
            n_tokens, n_decodes = sum(plan.n_tokens), sum(map(is_decode, plan.n_tokens, plan.samples))
            rearrange = self.rearranging.wanted(time.monotonic())
            group.vote(n_tokens, n_tokens - n_decodes, graph_ok=n_tokens == n_decodes, rearrange=rearrange)

    def _alone(self, plan: StepPlan) -> StepPlan:
        """A plan that no other core has a say in: only a step that begins with moves needs an agreement."""
        if not self.rearranging.wanted(time.monotonic()):
            return plan
        self.rearranging.done(time.monotonic())
        n_tokens = sum(plan.n_tokens)
        return msgspec.structs.replace(plan, agreement=StepAgreement([n_tokens], n_tokens, False, True))

    def _final(self, step: PlannedStep) -> StepPlan:
        return step.plan if self.pairing is None else self.pairing.lending.with_orders(step)

    def _note_busy(self) -> None:
        if not self.in_flight and self.proposed is None:
            self._busy_since_s = 0.0
        elif not self._busy_since_s:
            self._busy_since_s = time.monotonic()

    def _stopped(self) -> bool:
        """Whether this core may go: it was told to, and no other needs its ranks."""
        return self._told_to_stop and (self.group is None or self.group.dismissed)

    def _take_commands(self) -> None:
        """Apply what front ends sent."""
        for client, command in self.channel.receive_all():
            match command:
                case Submit():
                    self._submit(client, command)
                case Abort(request_ids):
                    self._send_all(self.scheduler.abort(request_ids))
                case Siblings(ports):
                    if self.pairing is not None:
                        self.pairing.lending.siblings = ports
                case Rearrange():
                    self.rearranging.asked = self.config.eplb is not None
                case Hello():
                    self.front_ends.add(client)
                    self._to(client, self.ready)
                    self._to(client, self._status())
                case Withdraw(n_requests):
                    self._to(client, Withdrawn(self.scheduler.withdraw(client, n_requests)))
                case Shutdown():
                    self._told_to_stop = True
                    if self.group is not None:
                        self.group.leave()

    def _submit(self, client: bytes, command: Submit) -> None:
        try:
            if command.pairing is not None and self.pairing is None:
                raise InvalidRequest("this server computes prompts for no other and takes none", "disaggregate_info")
            self.scheduler.submit(command, client, time.time())
            if command.pairing is not None and command.pairing.role == "prefill" and self.pairing is not None:
                self.pairing.lending.submitted(command.request_id, time.monotonic())
        except RequestError as error:
            delta = TokenDelta(command.request_id, [], "error", error=error.message, error_kind=type(error).__name__)
            self._to(client, StepOutput([delta]))

    def _status(self) -> Status:
        stalled_s = self.executor.stalled_s(self._busy_since_s) if self._busy_since_s else 0.0
        status = self.scheduler.status(stalled_s, self.executor.n_rows_of_expert)
        if self.config.eplb is not None:
            status = msgspec.structs.replace(status, experts=together(self.executor.experts))
        if self.pairing is None:
            return status
        return msgspec.structs.replace(status, pairing=self.pairing.status(status.pairing))

    def fail(self, error: FastDeployError) -> None:
        """Tell the group and every front end why this engine ends, also one whose Hello has not been read yet."""
        if self.group is not None:  # first: a front end that knows ends this process
            self.group.fail(str(error))
        if not self.front_ends:
            self.channel.socket.poll(_HELLO_PATIENCE_MS)
            self._meet_front_ends()
        self._broadcast(EngineFailed(type(error).__name__, str(error)))

    def stop(self) -> None:
        """End ranks and close the channels."""
        self.executor.stop()
        if self.group is not None:
            self.group.close()
        if self.pairing is not None:
            self.pairing.close()
        self.channel.close()

    def _on_progress(self, progress: LoadProgress) -> None:
        self._meet_front_ends()
        self._broadcast(progress)

    def _meet_front_ends(self) -> None:
        """Before requests are served, Hello is all that front ends say."""
        for client, command in self.channel.receive_all():
            if isinstance(command, Hello):
                self.front_ends.add(client)

    def _send_all(self, deltas: dict[bytes, list[TokenDelta]]) -> None:
        """To front ends, and what concerns decode servers to them."""
        if self.pairing is not None:
            self.pairing.lending.watch(deltas)
        self._send(deltas)

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
