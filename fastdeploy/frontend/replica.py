"""One data-parallel replica as its front end sees it: an engine core that is brought back when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import EngineError, EngineStartError, EngineUnavailable, FastDeployError
from fastdeploy.frontend.client import EngineClient, EngineProcess, Sink
from fastdeploy.frontend.ledger import RankLoad
from fastdeploy.wire.messages import GroupAddress, LoadProgress, Ready, Status, Submit

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0  # a start takes longer than that by itself
_STEADY_S = 3.0  # an engine that served for this long does not die of being started
_MAX_FAILED_STARTS = 5
_SILENCE_LIMIT_S = 6.0
_START_SILENCE_LIMIT_S = 15.0  # of a core, which does nothing that takes long
_NO_ENGINE = Status(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, stalled_s=0.0)

log = logging.getLogger("fastdeploy.replica")


class Replica:
    """Requests go to the engine that runs now; between two engines they are refused with the reason."""

    def __init__(
        self,
        config: EngineConfig,
        group: GroupAddress | None,
        on_status: Callable[[Status], None],
        on_withdrawn: Callable[[list[tuple[Submit, Sink]]], None],
        *,
        restart: bool,
    ) -> None:
        self.config = config
        self._group = group
        self._on_status = on_status
        self._on_withdrawn = on_withdrawn
        self._restart = restart
        self._siblings: list[int] = []
        self._client: EngineClient | None = None
        self._down: str | None = "starting"  # why no requests are taken; None while they are
        self._gone: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()
        self._keeper: asyncio.Task[None] | None = None
        self._idle_load = RankLoad()

    @property
    def load(self) -> RankLoad:
        """What the engine has to do."""
        return self._client.load if self._client is not None else self._idle_load

    @property
    def serving(self) -> bool:
        """Whether requests are taken."""
        return self._down is None

    async def start(self, on_progress: Callable[[LoadProgress], None]) -> Ready:
        """Bring the engine up for the first time. Raises the error that it failed with."""
        ready = await self._connect(on_progress)
        self._keeper = asyncio.create_task(self._keep(), name=f"replica {self.config.parallel.data_rank}")
        return ready

    def submit(self, request: Submit, inbox: Sink) -> None:
        """Send a request whose deltas go to `inbox`. Raises EngineUnavailable when there is no engine."""
        if self._down is not None or self._client is None:
            raise EngineUnavailable(f"the engine stopped: {self._down}")
        self._client.submit(request, inbox)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests that still run; their inbox gets a last delta."""
        if self._client is not None:
            self._client.abort(request_ids)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Abort requests nobody reads any more."""
        if self._client is not None:
            self._client.forget(request_ids)

    def withdraw(self, n_requests: int) -> None:
        """Ask for requests back that never ran; they come to `on_withdrawn`."""
        if self._client is not None and self.serving:
            self._client.withdraw(n_requests)

    def rearrange(self) -> None:
        """Ask for experts to be put where they should lie."""
        if self._client is not None and self.serving:
            self._client.rearrange()

    def health(self) -> str | None:
        """None while the engine makes progress or has nothing to do, else what is wrong."""
        if self._down is not None:
            return self._down
        return self._client.health() if self._client is not None else None

    def introduce(self, ports: list[int]) -> None:
        """Where all engine cores of this server listen for those of other servers, now and after a restart."""
        self._siblings = ports
        if self._client is not None:
            self._client.introduce(ports)

    async def gone(self) -> EngineError:
        """Waits until the engine is dead for good and says what it was."""
        return await asyncio.shield(self._gone)

    async def close(self) -> None:
        """Stop the engine; requests that still run fail."""
        self._down = "stopped"
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    async def _connect(self, on_progress: Callable[[LoadProgress], None]) -> Ready:
        try:
            engine = EngineProcess(self.config, self._group)
        except OSError as error:
            raise EngineStartError(f"could not start the engine core: {error}") from error
        self._client = EngineClient(engine, self.config.stall_limit_s, self._on_status, self._on_withdrawn)
        connecting = asyncio.create_task(self._client.connect(on_progress))
        try:
            while not (await asyncio.wait([connecting], timeout=1.0))[0]:
                # Whoever starts the server for the first time may also stop it for a while (Ctrl-Z).
                if self._keeper is not None and self._client.silence_s() > _START_SILENCE_LIMIT_S:
                    self._client.give_up(f"has been silent for {self._client.silence_s():.0f} s while starting")
        except asyncio.CancelledError:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            raise
        ready = connecting.result()
        if ready.control_ports:  # other servers have heard of this port: it stays after a restart
            self._keep_port(ready.control_ports[0])
        if self._siblings:
            self._client.introduce(self._siblings)
        self._down = None
        return ready

    def _keep_port(self, port: int) -> None:
        parallel, transfer = self.config.parallel, self.config.transfer
        ports = list(transfer.control_ports or [0] * parallel.n_local_replicas)
        ports[parallel.data_rank % parallel.n_local_replicas] = port
        self.config = replace(self.config, transfer=replace(transfer, control_ports=tuple(ports)))

    async def _death_of(self, client: EngineClient) -> EngineError:
        """Waits for the engine's end; one that would be replaced is also given up when it stays silent."""
        death = asyncio.create_task(client.died())
        while not (await asyncio.wait([death], timeout=1.0))[0]:
            if self._restart and client.silence_s() > _SILENCE_LIMIT_S:
                client.give_up(f"has been silent for {client.silence_s():.0f} s")
        return death.result()

    async def _keep(self) -> None:
        """Replace the engine whenever it dies: at once, but after a pause that grows while it keeps dying soon.

        It is given up after a number of starts that failed one after the other; one that served is always replaced.
        """
        pause_s = 0.0
        while True:
            assert self._client is not None
            served_since_s = time.monotonic()
            error: FastDeployError = await self._death_of(self._client)
            if time.monotonic() - served_since_s > _STEADY_S:
                pause_s = 0.0
            n_failed = 0
            while True:
                self._down = f"{error}; the engine is being started again" if self._restart else str(error)
                self._on_status(_NO_ENGINE)
                await self._client.close()
                if not self._restart or n_failed == _MAX_FAILED_STARTS:
                    self._down = str(error)
                    self._gone.set_result(error)  # type: ignore[arg-type]
                    return
                log.error("data-parallel rank %d: %s", self.config.parallel.data_rank, error)
                log.info("starting it again in %.1f s", pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
                try:
                    await self._connect(lambda _: None)
                    break
                except FastDeployError as again:
                    error = again
                    n_failed += 1
            log.info("data-parallel rank %d serves again", self.config.parallel.data_rank)
