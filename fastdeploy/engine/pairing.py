"""The sockets between engine cores of prefill and decode servers, and the clock for both sides' rules."""

from __future__ import annotations

import os
import time
import uuid

import zmq

from fastdeploy.config.parallel import is_local
from fastdeploy.config.schema import EngineConfig
from fastdeploy.engine.fetching import Address, Fetching
from fastdeploy.engine.lending import Lending
from fastdeploy.engine.scheduler import Deltas, Scheduler
from fastdeploy.errors import EngineStartError
from fastdeploy.executor.executor import Executor
from fastdeploy.wire.channel import ControlChannel, PrefillChannel
from fastdeploy.wire.control import StillHere
from fastdeploy.wire.control_keys import control_keys
from fastdeploy.wire.messages import PagesComputed, PairingStatus, PullEnded

_TICK_S = 0.25
_SPEAK_EVERY_S = 1.0
LOOPBACK = "127.0.0.1"


class PairingLink:
    """What one engine core needs to work with those of other servers. `lending` and `fetching` hold the rules."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, executor: Executor) -> None:
        """Raises EngineStartError when the control port cannot be bound."""
        transfer, parallel = config.transfer, config.parallel
        self._core = uuid.uuid4().hex
        self._executor = executor
        self._host = transfer.host
        self._public_key, secret_key = control_keys(os.environ)
        local_rank = parallel.data_rank % parallel.n_local_replicas
        port = transfer.control_ports[local_rank] if transfer.control_ports else 0
        try:
            self._server = ControlChannel(transfer.host, port, secret_key, self._public_key)
        except zmq.ZMQError as error:
            raise EngineStartError(f"--pd-comm-port {port} ({transfer.host}): {error}; choose another port") from error
        self.port = self._server.port
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._peers: dict[Address, PrefillChannel] = {}
        self._poller: zmq.Poller | None = None
        self.lending = Lending(scheduler, executor.endpoints, self._core, transfer.wait_limit_s)
        self.lending.siblings = [self.port]
        self.fetching = Fetching(scheduler, executor.endpoints)
        self._tick_due_s = self._speak_due_s = 0.0

    @property
    def pause_s(self) -> float:
        """How long the core may sleep."""
        return max(self._tick_due_s - time.monotonic(), 0.0)

    def register(self, poller: zmq.Poller) -> None:
        """The sockets, also those made later, are to be polled."""
        self._poller = poller
        poller.register(self._server.socket, zmq.POLLIN)

    def turn(self) -> Deltas:
        """Take in what has arrived from other cores and from the ranks; returns what clients get."""
        now_s = time.monotonic()
        for peer, command in self._server.receive_all():
            self.lending.take(peer, command, now_s)
        for address, channel in self._peers.items():
            for event in channel.receive_all():
                self.fetching.take(address, event, now_s)
        arrived, self._executor.transfer_events = self._executor.transfer_events, []
        for rank, transfer_event in arrived:
            match transfer_event:
                case PagesComputed():
                    self.lending.computed(rank, transfer_event)
                case PullEnded():
                    self.fetching.pull_ended(transfer_event, now_s)
        if now_s >= self._tick_due_s:
            self._tick_due_s = now_s + _TICK_S
            self.lending.tick(now_s)
            self.fetching.tick(now_s)
            self._speak(now_s)
        return self._outputs()

    def flush(self) -> Deltas:
        """Send what the scheduler's last plan brought about; returns what clients get."""
        self.fetching.advance(time.monotonic())
        for peer, event in self.lending.messages:
            self._server.send(peer, event)
        self.lending.messages.clear()
        for address, command in self.fetching.messages:
            self._channel_to(address).send(command)
        self.fetching.messages.clear()
        for rank, transfer_command in self.fetching.commands:
            self._executor.send_to(rank, transfer_command)
        self.fetching.commands.clear()
        return self._outputs()

    def status(self, base: PairingStatus) -> PairingStatus:
        """`base` with what both sides counted."""
        return self.fetching.status(base, self.lending.n_send_failed)

    def close(self) -> None:
        """Close all sockets."""
        for channel in self._peers.values():
            channel.socket.close()
        self._context.term()
        self._server.close()

    def _speak(self, now_s: float) -> None:
        if now_s < self._speak_due_s:
            return
        self._speak_due_s = now_s + _SPEAK_EVERY_S
        still_here = StillHere(self._core)
        self.lending.messages += [(peer, still_here) for peer in self.lending.peers()]
        self.fetching.messages += [(address, still_here) for address in self.fetching.peers()]

    def _outputs(self) -> Deltas:
        merged: Deltas = {}
        for side in (self.lending, self.fetching):
            for deltas in side.outputs:
                self.lending.watch(deltas)
                for client, of_client in deltas.items():
                    merged.setdefault(client, []).extend(of_client)
            side.outputs.clear()
        return merged

    def _channel_to(self, address: Address) -> PrefillChannel:
        channel = self._peers.get(address)
        if channel is None:
            host, port = address
            if self._host == LOOPBACK and is_local(host):  # a server of this machine listens on loopback as well
                host = LOOPBACK
            channel = self._peers[address] = PrefillChannel(self._context, host, port, self._public_key)
            if self._poller is not None:
                self._poller.register(channel.socket, zmq.POLLIN)
        return channel
