"""An engine core's place in an expert-parallel group: it joins, votes, and notices the end of the group.

The core of data-parallel rank 0 also serves the hub (`dp_sync.Hub`). All of a group live and die together: the first
failure is told to all, whoever stays silent is counted as failed, and every core that started again joins the next
group at the same endpoint.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable

import msgspec
import zmq

from fastdeploy import __version__
from fastdeploy.config.schema import EngineConfig
from fastdeploy.engine.dp_sync import SILENCE_LIMIT_S, Hub, Outbox
from fastdeploy.errors import EngineDeadError, EngineStartError
from fastdeploy.runner.graph_sizes import graph_sizes
from fastdeploy.wire.channel import HubChannel, MemberChannel
from fastdeploy.wire.group import Agreed, Alive, Complete, Dismissed, GroupFailed, Join, Leave, Missing, StepOpen, Vote
from fastdeploy.wire.messages import GroupAddress, GroupStore, LoadProgress, StepAgreement

_SPEAK_EVERY_S = 1.0
_LEAST_SHARE = 8  # of a step's token budget, prompts get so much however little others have

log = logging.getLogger("fastdeploy.group")


class CoreGroup:
    """The other engine cores, as one of them sees them. `sockets` are to be polled; `advance` does all the work."""

    def __init__(self, config: EngineConfig, address: GroupAddress) -> None:
        """Raises EngineStartError when the hub's endpoint cannot be bound."""
        self._parallel = config.parallel
        self._address = address
        self._fingerprint = _fingerprint(config)
        self._hub: Hub | None = None
        self._hub_channel: HubChannel | None = None
        if config.parallel.data_rank == 0:
            sizes = (
                graph_sizes(config.scheduler.max_seqs)
                if config.model.device == "cuda" and config.transfer.role != "prefill"
                else ()
            )
            limits = config.scheduler
            least = max(limits.max_batched_tokens // _LEAST_SHARE, 1) if limits.chunked_prefill else None
            self._hub = Hub(config.parallel.data, self._fingerprint, sizes, least)
            try:
                self._hub_channel = HubChannel(address.endpoint, address.secret_key, address.public_key)
            except zmq.ZMQError as error:
                raise EngineStartError(f"cannot serve the group's meeting point {address.endpoint}: {error}") from error
        self._channel = MemberChannel(address.endpoint, address.public_key)
        self.sockets = [self._channel.socket, *([self._hub_channel.socket] if self._hub_channel else [])]
        self.store: GroupStore | None = None  # where the ranks meet, once it is known
        self.step_open = False  # another core has work and waits for this one's vote
        self.dismissed = False  # no other core needs this one
        self._complete = False
        self._missing: list[int] | None = None  # None: the hub has not spoken yet
        self._missing_told: list[int] | None = None
        self._agreement: StepAgreement | None = None
        self._step = 0
        self._started_s = self._heard_s = time.monotonic()
        self._speak_due_s = 0.0

    def check_complete(self, on_progress: Callable[[LoadProgress], None]) -> None:
        """While the group forms: report who is there. Raises EngineStartError naming who did not come in time."""
        if self._complete:
            return
        if self._missing != self._missing_told:
            self._missing_told = self._missing
            n_data = self._parallel.data
            n_there = n_data - len(self._missing) if self._missing is not None else 0
            on_progress(LoadProgress("waiting for the other replicas", n_there, n_data, "replicas"))
        if time.monotonic() - self._started_s > self._address.patience_s:
            raise EngineStartError(self._who_is_late())

    def vote(self, n_tokens: int, n_prompt_tokens: int, *, graph_ok: bool, rearrange: bool = False) -> None:
        """Say what this core would compute in the next step; `take_agreement` has the answer."""
        self._channel.send(Vote(self._step, n_tokens, graph_ok, n_prompt_tokens, rearrange))
        self.step_open = False

    def take_agreement(self) -> StepAgreement | None:
        """The agreement on the step voted for, once."""
        agreement, self._agreement = self._agreement, None
        return agreement

    def open_store(self, store: GroupStore) -> None:
        """This core's rank is the one at which all ranks meet: tell the others where."""
        self._channel.send(store)

    def leave(self) -> None:
        """This core has nothing more to do. `dismissed` turns true when that holds for all."""
        self._channel.send(Leave())

    def fail(self, error: str) -> None:
        """This core cannot go on: tell the others why, if they do not know it already."""
        if self._hub is None:
            self._channel.send(Leave(error))
        else:  # at once: this process ends, and nobody would answer what is on its way to the hub
            self._send_all(self._hub.end(f"data-parallel rank {self._parallel.data_rank}: {error}"))

    def advance(self) -> None:
        """Take in what has arrived, and say that this core is alive. Raises EngineDeadError at the group's end."""
        now_s = time.monotonic()
        if now_s >= self._speak_due_s:
            self._speak_due_s = now_s + _SPEAK_EVERY_S
            rank = self._parallel.data_rank
            self._channel.send(Alive() if self._complete else Join(rank, self._fingerprint))
            if self._hub is not None:
                self._send_all(self._hub.tick(now_s))
        self._serve_hub(now_s)
        for event in self._channel.receive_all():
            self._heard_s = now_s
            match event:
                case StepOpen(step):
                    self.step_open = step == self._step
                case Agreed(step, agreement):
                    assert step == self._step, "an agreement on another step than the one voted for"
                    self._agreement = agreement
                    log.debug("step %d: %s tokens, %d rows", step, agreement.n_tokens_d, agreement.n_rows)
                    self._step += 1
                    self.step_open = False  # the call may have crossed with this core's vote
                case GroupStore():
                    self.store = event
                case Missing(data_ranks):
                    self._missing = data_ranks
                case Complete():
                    self._complete, self._missing = True, []
                case Dismissed():
                    self.dismissed = True
                case GroupFailed(reason):
                    raise EngineDeadError(reason)
        if self._complete and now_s - self._heard_s > SILENCE_LIMIT_S:
            raise EngineDeadError(
                f"data-parallel rank 0, which leads the group, has been silent for {SILENCE_LIMIT_S:.0f} s"
            )

    def close(self) -> None:
        """Send what is queued and close."""
        self._channel.close()
        if self._hub_channel is not None:
            self._hub_channel.close()

    def _serve_hub(self, now_s: float) -> None:
        if self._hub is None or self._hub_channel is None:
            return
        for sender, command in self._hub_channel.receive_all():
            self._send_all(self._hub.take(sender, command, now_s))

    def _send_all(self, outbox: Outbox) -> None:
        assert self._hub_channel is not None
        for member, event in outbox:
            self._hub_channel.send(member, event)  # one that is gone falls silent, and is noticed so

    def _who_is_late(self) -> str:
        parallel, waited = self._parallel, f"{self._address.patience_s:.0f} s (FD_GROUP_TIMEOUT)"
        advice = "check that the same command runs there, that it did not fail (its log), and that this address is open"
        if self._missing is None:
            host = f" on {parallel.hosts[0]}" if len(parallel.hosts) > 1 else ""
            return f"data-parallel rank 0{host} did not answer at {self._address.endpoint} within {waited}: {advice}"
        late = ", ".join(
            str(rank) + (f" on {parallel.hosts[rank // parallel.n_local_replicas]}" if len(parallel.hosts) > 1 else "")
            for rank in self._missing
        )
        return f"data-parallel rank {late} did not join at {self._address.endpoint} within {waited}: {advice}"


def _fingerprint(config: EngineConfig) -> str:
    """Equal on cores that can compute together: version, model, sizes, a step's limits; not paths, threads or pages."""
    parallel, model, limits = config.parallel, config.model, config.scheduler
    parts = (__version__, model.shape, model.dtype, model.random_weights, model.seed)
    sizes = (
        parallel.tensor,
        parallel.data,
        parallel.expert,
        parallel.hosts,
        limits.max_seqs,
        limits.max_batched_tokens,
        config.eplb,
    )
    return hashlib.blake2b(msgspec.json.encode((parts, sizes)), digest_size=16).hexdigest()
