"""The sockets between engine cores of prefill and decode servers, and the clock for both sides' rules."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Container, Iterator

import zmq

from fastdeploy.config.parallel import is_local
from fastdeploy.config.schema import EngineConfig
from fastdeploy.engine.fetching import Address, Fetching
from fastdeploy.engine.lending import Lending
from fastdeploy.engine.scheduler import Deltas, Scheduler
from fastdeploy.errors import EngineStartError
from fastdeploy.executor.executor import Executor
from fastdeploy.wire.channel import ControlChannel, PrefillChannel
from fastdeploy.wire.control import OfferEvent, StillHere, WantCommand
from fastdeploy.wire.control_keys import control_keys
from fastdeploy.wire.messages import PagesComputed, PairingStatus, PullEnded

_TICK_S = 0.25
_SPEAK_EVERY_S = 1.0
_KEEP_S = 60.0  # a channel nobody speaks on
LOOPBACK = "127.0.0.1"


class PrefillChannels:
    """Channels to prefill cores, each made when first spoken to, and closed when that is long ago."""

    def __init__(self, own_host: str, public_key: bytes) -> None:
        self._own_host = own_host
        self._public_key = public_key
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channels: dict[Address, PrefillChannel] = {}
        self._used_s: dict[Address, float] = {}
        self._poller: zmq.Poller | None = None

    def register(self, poller: zmq.Poller) -> None:
        """All sockets, also those made later, are to be polled."""
        self._poller = poller
        for channel in self._channels.values():
            poller.register(channel.socket, zmq.POLLIN)

    def send(self, address: Address, command: WantCommand, now_s: float) -> None:
        """Send one message, as PrefillChannel does."""
        self._used_s[address] = now_s
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._connect(*address)
        channel.send(command)

    def receive_all(self) -> Iterator[tuple[Address, OfferEvent]]:
        """(sender, message) for all that has arrived; does not wait."""
        for address, channel in self._channels.items():
            for event in channel.receive_all():
                yield address, event

    def let_go(self, now_s: float, busy: Container[Address]) -> list[Address]:
        """Close those that are not `busy` and were last used too long ago; returns their addresses."""
        idle = [one for one, used_s in self._used_s.items() if now_s - used_s > _KEEP_S and one not in busy]
        for address in idle:
            del self._used_s[address]
            self._close(self._channels.pop(address))
        return idle

    def close(self) -> None:
        """Close all."""
        for channel in self._channels.values():
            self._close(channel)
        self._context.term()

    def _connect(self, host: str, port: int) -> PrefillChannel:
        if self._own_host == LOOPBACK and is_local(host):  # a server of this machine listens on loopback as well
            host = LOOPBACK
        channel = PrefillChannel(self._context, host, port, self._public_key)
        if self._poller is not None:
            self._poller.register(channel.socket, zmq.POLLIN)
        return channel

    def _close(self, channel: PrefillChannel) -> None:
        if self._poller is not None:
            self._poller.unregister(channel.socket)
        channel.socket.close()


class PairingLink:
    """What one engine core needs to work with those of other servers. `lending` and `fetching` hold the rules."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, executor: Executor) -> None:
        """Raises EngineStartError when the control port cannot be bound."""
        transfer, parallel = config.transfer, config.parallel
        self._core = uuid.uuid4().hex
        self._executor = executor
        public_key, secret_key = control_keys(os.environ)
        local_rank = parallel.data_rank % parallel.n_local_replicas
        port = transfer.control_ports[local_rank] if transfer.control_ports else 0
        try:
            self._server = ControlChannel(transfer.host, port, secret_key, public_key)
        except zmq.ZMQError as error:
            raise EngineStartError(f"--pd-comm-port {port} ({transfer.host}): {error}; choose another port") from error
        self.port = self._server.port
        self._channels = PrefillChannels(transfer.host, public_key)
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
        self._channels.register(poller)
        poller.register(self._server.socket, zmq.POLLIN)

    def turn(self) -> Deltas:
        """Take in what has arrived from other cores and from the ranks; returns what clients get."""
        now_s = time.monotonic()
        for peer, command in self._server.receive_all():
            self.lending.take(peer, command, now_s)
        for address, event in self._channels.receive_all():
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
            for address in self._channels.let_go(now_s, self.fetching.spoken_to()):
                self.fetching.forget(address)
        return self._outputs()

    def flush(self) -> Deltas:
        """Send what the scheduler's last plan brought about; returns what clients get."""
        now_s = time.monotonic()
        self.fetching.advance(now_s)
        for peer, event in self.lending.messages:
            self._server.send(peer, event)
        self.lending.messages.clear()
        for address, command in self.fetching.messages:
            self._channels.send(address, command, now_s)
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
        self._channels.close()
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
