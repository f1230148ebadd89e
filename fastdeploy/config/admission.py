"""Where the requests of a server wait: what the --scheduler-... flags mean together.

Not part of `EngineConfig`, which is shown by /config-info and sent to every process: the password stays here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastdeploy.config.args import EngineArgs
from fastdeploy.errors import ConfigError

SchedulerName = Literal["local", "dp", "global", "splitwise"]
Role = Literal["mixed", "prefill", "decode"]
MAX_PARALLEL, MAX_BATCH, MAX_SHARDS = 64, 10_000, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """The waiting room of one server; all times are in seconds, whatever the flags say."""

    name: SchedulerName = "local"
    host: str = "127.0.0.1"
    port: int = 6379
    db: int = 0
    password: str | None = field(default=None, repr=False)
    topic: str = "default"
    ttl_s: float = 900.0
    role: Role = "mixed"
    sync_period_s: float = 0.005
    expire_period_s: float = 3.0
    release_load_s: float = 600.0
    n_readers: int = 4
    n_writers: int = 4
    reader_batch: int = 200
    writer_batch: int = 200
    min_load_score: float = 3.0
    n_load_shards: int = 1

    @property
    def uses_redis(self) -> bool:
        """Whether requests are shared with other servers."""
        return self.name in ("global", "splitwise")


def resolve_admission(args: EngineArgs) -> AdmissionConfig:
    """What the flags say. Raises ConfigError with one line for each flag that is out of its range."""
    lines = [
        f"--{name.replace('_', '-')} {value}: must be {rule}"
        for name, value, holds, rule in (
            ("scheduler_host", args.scheduler_host or "''", bool(args.scheduler_host), "a host name or address"),
            ("scheduler_port", args.scheduler_port, 1 <= args.scheduler_port <= 65535, "in 1..65535"),
            ("scheduler_db", args.scheduler_db, args.scheduler_db >= 0, "at least 0"),
            ("scheduler_topic", args.scheduler_topic or "''", bool(args.scheduler_topic), "a name"),
            ("scheduler_ttl", args.scheduler_ttl, args.scheduler_ttl >= 1, "at least 1 second"),
            ("scheduler_sync_period", args.scheduler_sync_period, args.scheduler_sync_period >= 1, "at least 1 (ms)"),
            (
                "scheduler_expire_period",
                args.scheduler_expire_period,
                args.scheduler_expire_period >= max(200, 4 * args.scheduler_sync_period),
                "at least 200 (ms) and four times --scheduler-sync-period",
            ),
            (
                "scheduler_release_load_expire_period",
                args.scheduler_release_load_expire_period,
                args.scheduler_release_load_expire_period >= 1,
                "at least 1 second",
            ),
            (
                "scheduler_min_load_score",
                args.scheduler_min_load_score,
                args.scheduler_min_load_score >= 1,
                "at least 1",
            ),
            *(
                (name, getattr(args, name), 1 <= getattr(args, name) <= most, f"in 1..{most}")
                for name, most in (
                    ("scheduler_load_shards_num", MAX_SHARDS),
                    ("scheduler_reader_parallel", MAX_PARALLEL),
                    ("scheduler_writer_parallel", MAX_PARALLEL),
                    ("scheduler_reader_batch_size", MAX_BATCH),
                    ("scheduler_writer_batch_size", MAX_BATCH),
                )
            ),
        )
        if not holds
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return AdmissionConfig(
        name=args.scheduler_name,
        host=args.scheduler_host,
        port=args.scheduler_port,
        db=args.scheduler_db,
        password=args.scheduler_password,
        topic=args.scheduler_topic,
        ttl_s=float(args.scheduler_ttl),
        role=args.splitwise_role,
        sync_period_s=args.scheduler_sync_period / 1000,
        expire_period_s=args.scheduler_expire_period / 1000,
        release_load_s=float(args.scheduler_release_load_expire_period),
        n_readers=args.scheduler_reader_parallel,
        n_writers=args.scheduler_writer_parallel,
        reader_batch=args.scheduler_reader_batch_size,
        writer_batch=args.scheduler_writer_batch_size,
        min_load_score=args.scheduler_min_load_score,
        n_load_shards=args.scheduler_load_shards_num,
    )
