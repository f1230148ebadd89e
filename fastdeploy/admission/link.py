"""The connection to Redis: found at start or refused with what to do, and known to be up or down ever after."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from fastdeploy.admission.metrics import AdmissionMetrics
from fastdeploy.config.admission import AdmissionConfig
from fastdeploy.errors import ConfigError

Result = TypeVar("Result")

LEAST_VERSION = (6, 2)  # BLMOVE
BLOCK_S = 1.0  # a command waits for that long inside Redis
_ANSWER_S = 2.0  # and its answer may take that long
_START_S = 4.0
_PAUSES_S = (0.05, 0.5)

log = logging.getLogger("fastdeploy.scheduler")


class RedisLink:
    """One Redis as this server sees it. Everything that talks to it goes through `call`."""

    def __init__(self, config: AdmissionConfig, metrics: AdmissionMetrics) -> None:
        self.client: Any = aioredis.Redis(  # its methods are typed for both kinds of client at once
            host=config.host,
            port=config.port,
            db=config.db,
            password=config.password,
            socket_connect_timeout=_ANSWER_S,
            socket_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=1024,
        )
        self._config = config
        self._metrics = metrics
        self._failed_s: float | None = None
        self._error = ""
        self._clock_s = 0.0  # Redis' time minus this process' monotonic one
        self._run_id: str | None = None

    async def open(self) -> None:
        """Raises ConfigError within 5 s when there is no usable Redis; the text says how to start one."""
        try:
            async with asyncio.timeout(_START_S):
                info = await self.client.info("server")
                await self.beat()
        except (RedisError, OSError, TimeoutError) as error:
            await self.close()
            raise ConfigError(self._why_not(error)) from None
        version = str(info.get("redis_version", ""))
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers < LEAST_VERSION:
            await self.close()
            raise ConfigError(self._too_old(version or "of unknown version"))
        log.info("Redis %s at %s, database %d", version, self.where, self._config.db)

    @property
    def where(self) -> str:
        """host:port."""
        return f"{self._config.host}:{self._config.port}"

    @property
    def down_s(self) -> float:
        """Seconds since Redis stopped answering; 0 while it does."""
        return 0.0 if self._failed_s is None else time.monotonic() - self._failed_s

    @property
    def state(self) -> str:
        """One line for /health."""
        return "reachable" if self._failed_s is None else f"unreachable for {self.down_s:.0f} s: {self._error}"

    def now_s(self) -> float:
        """Time by the clock of Redis, which all servers share."""
        return time.monotonic() + self._clock_s

    async def beat(self) -> bool:
        """Ask for time and identity. False when Redis was started anew since, and may have lost what it held."""
        async with self.client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.info("server")
            (seconds, microseconds), info = await pipe.execute()
        self._clock_s = seconds + microseconds / 1e6 - time.monotonic()
        known, self._run_id = self._run_id, info["run_id"]
        return known in (None, self._run_id)

    async def call(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """`work()`, and note how it went. Raises RedisError or OSError."""
        try:
            result = await work()
        except (RedisError, OSError, TimeoutError) as error:
            self._metrics.redis_errors += 1
            self._error = f"{type(error).__name__}: {error}"
            if self._failed_s is None:
                self._failed_s = time.monotonic()
                log.warning("Redis at %s: %s", self.where, self._error)
            raise
        if self._failed_s is not None:
            log.info("Redis at %s answers again after %.1f s", self.where, self.down_s)
            self._failed_s = None
        return result

    async def persist(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """`work()` again and again until Redis answers; it must do no harm when it is done twice."""
        pause_s = _PAUSES_S[0]
        while True:
            try:
                return await self.call(work)
            except ResponseError:
                raise  # asked again it would say the same
            except (RedisError, OSError, TimeoutError):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSES_S[1])

    async def close(self) -> None:
        """Close all connections, also those that a cancelled command had."""
        await self.client.connection_pool.disconnect(inuse_connections=True)
        await self.client.aclose()
        await asyncio.sleep(0)  # a transport is closed in the next turn of the loop

    def _too_old(self, version: str) -> str:
        return (
            f"--scheduler-host, --scheduler-port: Redis {version} at {self.where} is too old for --scheduler-name "
            f"{self._config.name}; 6.2 is needed (or Valkey). `fastdeploy redis` starts one"
        )

    def _why_not(self, error: BaseException) -> str:
        name = f"--scheduler-name {self._config.name}"
        if isinstance(error, (AuthenticationError, NoPermissionError)) or "NOAUTH" in str(error):
            return f"--scheduler-password: Redis at {self.where} refused it ({error})"
        if isinstance(error, ResponseError) and "unknown command" in str(error) and "HELLO" in str(error).upper():
            return self._too_old("older than 6.0")  # which that command came with
        if isinstance(error, ResponseError):
            return f"--scheduler-db {self._config.db}: Redis at {self.where} said: {error}"
        what = str(error) or f"no answer within {_START_S:.0f} s"
        return (
            f"{name}: no Redis at {self.where} (--scheduler-host, --scheduler-port): {what}\n"
            f"`fastdeploy redis --port {self._config.port}` starts one and prints the flags to use; any redis-server "
            "from 6.2 or Valkey will do"
        )
