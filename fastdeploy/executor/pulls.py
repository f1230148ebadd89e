"""A rank's reads of other ranks' pages: one thread that starts them, waits for them and reports."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Container

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import ConfigError, TransferError, TransferUnavailable
from fastdeploy.transfer.base import Endpoint, Peer, Pull, Transport, make_transport
from fastdeploy.transfer.choose import choose, nixl_usable, offered_names
from fastdeploy.transfer.machine import machine_id
from fastdeploy.transfer.memory import PageMemory
from fastdeploy.wire.messages import CancelPull, ForgetPulls, PullEnded, PullPages, TransferCommand

_POLL_S = 0.0005
_IDLE_S = 0.2
_KEEP_S = 60.0

log = logging.getLogger("fastdeploy.transfer")


class KnownPeers:
    """Ranks that were read from. Those not used for a while are let go: their memory may be kept by this rank alone."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[Transport, Peer, float]] = {}  # by owner

    def connect(self, transport: Transport, endpoint: Endpoint, now_s: float) -> Peer:
        """The peer, which is used now. Raises TransferError."""
        peer = transport.connect(endpoint)
        self._used[endpoint.owner] = (transport, peer, now_s)
        return peer

    def let_go(self, now_s: float, busy: Container[str]) -> None:
        """Disconnect from owners that are not `busy` and were last used too long ago."""
        for owner, (transport, peer, used_s) in list(self._used.items()):
            if now_s - used_s > _KEEP_S and owner not in busy:
                del self._used[owner]
                transport.disconnect(peer)


class Pulls:
    """Transports of one rank and what they read now. `endpoint` is how others reach this rank's pages."""

    def __init__(
        self, config: EngineConfig, number: int, memory: PageMemory, owner: str, send: Callable[[PullEnded], None]
    ) -> None:
        """`number`: of the rank. Raises ConfigError when no allowed protocol works here."""
        transfer, device = config.transfer, config.model.device
        self._protocols = transfer.protocols
        self._send = send
        self._transports: dict[str, Transport] = {}
        self._running: dict[int, tuple[Transport, Pull, PullPages]] = {}
        self._peers = KnownPeers()
        n_local = config.parallel.n_ranks // len(config.parallel.hosts)
        port = transfer.rank_ports[number % n_local] if transfer.rank_ports else 0
        problems = []
        has_nixl = "rdma" in transfer.protocols and nixl_usable(device)
        for name in offered_names(transfer.protocols, device, has_nixl):
            try:
                self._transports[name] = make_transport(name, memory, owner, transfer.host, port)
            except (TransferUnavailable, ImportError) as error:
                problems.append(f"{name}: {error}")
        if not self._transports:
            raise ConfigError(f"--cache-transfer-protocol {','.join(transfer.protocols)}: {'; '.join(problems)}")
        for problem in problems:
            log.warning("not offered: %s", problem)
        offers = {name: transport.offer() for name, transport in self._transports.items()}
        self.endpoint = Endpoint(owner, transfer.host, machine_id(), device, memory.layout, offers)

    def serve(self, commands: queue.SimpleQueue[TransferCommand]) -> None:
        """Carry out commands for ever."""
        while True:
            try:
                self._take(commands.get(timeout=_POLL_S if self._running else _IDLE_S))
                while True:
                    self._take(commands.get_nowait())
            except queue.Empty:
                pass
            for pull_id in list(self._running):
                self._look_at(pull_id)
            self._peers.let_go(time.monotonic(), {command.peer.owner for _, _, command in self._running.values()})

    def _take(self, command: TransferCommand) -> None:
        match command:
            case PullPages():
                self._start(command)
            case CancelPull(pull_id):
                found = self._running.pop(pull_id, None)
                if found is not None:
                    transport, pull, _ = found
                    transport.cancel(pull)
                    self._send(PullEnded(pull_id, 0, "cancelled"))
            case ForgetPulls(request_id):
                for transport in self._transports.values():
                    transport.forget(request_id)

    def _start(self, command: PullPages) -> None:
        try:
            transport = self._transports[choose(self._protocols, self.endpoint, command.peer)]
            peer = self._peers.connect(transport, command.peer, time.monotonic())
            pull = transport.pull(peer, command.source, command.page_ids, command.patience_s)
        except (TransferError, ValueError) as error:
            self._send(PullEnded(command.pull_id, 0, f"{type(error).__name__}: {error}"))
        else:
            self._running[command.pull_id] = (transport, pull, command)

    def _look_at(self, pull_id: int) -> None:
        transport, pull, command = self._running[pull_id]
        try:
            if transport.poll(pull) == "pending":
                return
        except TransferError as error:
            del self._running[pull_id]
            self._send(PullEnded(pull_id, 0, f"{type(error).__name__}: {error}"))
            return
        del self._running[pull_id]
        n_bytes = len(command.page_ids) * command.source.n_layers * self.endpoint.layout.page_bytes
        self._send(PullEnded(pull_id, n_bytes))
