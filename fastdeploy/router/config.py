"""The router's configuration: a YAML file, over which flags win, resolved once into a frozen `RouterConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from fastdeploy.config.flags import suggestion
from fastdeploy.errors import ConfigError
from fastdeploy.router.health import ManagerSettings
from fastdeploy.router.placement import PairSettings
from fastdeploy.router.policies import POLICIES, SchedulerSettings
from fastdeploy.router.record import Record, record_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The section `server`. `port` is None until a flag or the file names one; 0 takes a free port."""

    name: str = ""
    host: str = "0.0.0.0"
    port: int | None = None
    mode: str = "release"
    splitwise: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """The section `log`. The file is always written; `output: file` keeps the console free of it."""

    level: str = "info"
    output: str = "stdout"
    max_age_days: int = 7
    max_total_size_mb: int = 500
    cleanup_interval_secs: float = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Everything that is decided before the router starts."""

    server: ServerSettings = field(default_factory=ServerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    manager: ManagerSettings = field(default_factory=ManagerSettings)
    log: LogSettings = field(default_factory=LogSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    request_timeout_s: float = 1800
    workers: int = 1


_SECTIONS: Mapping[str, type] = MappingProxyType(
    {"server": ServerSettings, "scheduler": SchedulerSettings, "manager": ManagerSettings, "log": LogSettings}
)
_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "server.mode": ("debug", "release", "test"),
        "scheduler.policy": tuple(POLICIES),
        "scheduler.prefill-policy": tuple(POLICIES),
        "scheduler.decode-policy": tuple(POLICIES),
        "log.level": ("debug", "info", "warn", "warning", "error"),
        "log.output": ("stdout", "file"),
    }
)
_NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "scheduler.tokenizer-url": "prompts are compared by characters, so that no request waits for a tokenizer",
        "scheduler.tokenizer-timeout-secs": "no tokenizer is asked",
        "log.max-total-size-mb": "files are kept by their age (max-age-days)",
        "log.cleanup-interval-secs": "old files are removed when a new day begins",
    }
)

T = TypeVar("T")


def load_config(
    path: str, host: str | None = None, port: int | None = None, splitwise: bool | None = None
) -> RouterConfig:
    """The file at `path` ("" for none) with the flags given. Raises `ConfigError` naming the key."""
    config = parse_config(_read_yaml(Path(path)), path) if path else RouterConfig()
    given = {"host": host, "port": port, "splitwise": splitwise}
    server = dataclasses.replace(config.server, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    config = dataclasses.replace(config, server=server)
    _check(config)
    return config


def parse_config(content: Any, source: str) -> RouterConfig:
    """The configuration in the content of a YAML file. Raises `ConfigError`."""
    sections: dict[str, Any] = {}
    for name, value in _mapping(content, source, "").items():
        if name not in _SECTIONS:
            raise ConfigError(f"{source}: no section {name!r}{_hint(name, _SECTIONS)}")
        sections[name] = _section(_SECTIONS[name], name, _mapping(value, source, name), source)
    return RouterConfig(**sections)


def without_effect(config: RouterConfig) -> list[str]:
    """One line for every key that was set and does nothing."""
    lines = []
    for key, why in _NO_EFFECT.items():
        section, name = key.split(".")
        settings = getattr(config, section)
        if getattr(settings, _field(name)) != getattr(type(settings)(), _field(name)):
            lines.append(f"{key} has no effect: {why}")
    return lines


def load_instances(path: str) -> tuple[list[Record], list[str]]:
    """The servers of a `register-path` file, and what is wrong with those left out. Raises `ConfigError`."""
    content = _mapping(_read_yaml(Path(path)), path, "")
    if content.keys() - {"instances"} or not isinstance(content.get("instances") or [], list):
        raise ConfigError(f"{path}: expected one key, `instances`, with a list of servers")
    records, problems = [], []
    for i, fields in enumerate(content.get("instances") or []):
        try:
            record = record_of(fields)
        except ConfigError as exc:
            problems.append(f"Failed to register instance: {path}: instances[{i}]: {exc}")
            continue
        records.append(record)
    return records, problems


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror or exc}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(exc).split())}") from None


def _mapping(value: Any, source: str, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{source}: {name or 'the file'} must hold keys and values")
    return value


def _section(cls: type[T], section: str, given: Mapping[str, Any], source: str) -> T:
    hints = get_type_hints(cls)
    known = {name.replace("_", "-"): hint for name, hint in hints.items()}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{source}: no key {section}.{key}{_hint(key, known)}")
        if value is None or value == "" or (value == 0 and not isinstance(value, bool) and key != "port"):
            continue  # as the routers before this one read it: empty or zero is the default
        name = f"{section}.{key}"
        try:
            converted = _convert(value, known[key])
        except ValueError as exc:
            raise ConfigError(f"{source}: {name}: expected {exc}, got {value!r}") from None
        choices = _CHOICES.get(name)
        if choices is not None and converted not in choices:
            raise ConfigError(f"{source}: {name}: {value!r} is none of {', '.join(choices)}")
        values[_field(key)] = converted
    return cls(**values)


def _convert(value: Any, hint: Any) -> Any:
    """A YAML value as the type of its field; numbers may be quoted. Raises ValueError with what was expected."""
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if hint is str:
        if isinstance(value, str):
            return value
        raise ValueError("text")
    kind = float if hint is float else int
    expected = "a number of 0 or more" if kind is float else "a whole number of 0 or more"
    try:
        number = kind(value) if not isinstance(value, bool) and not (kind is int and isinstance(value, float)) else -1
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if not 0 <= number < float("inf"):
        raise ValueError(expected)
    return number


def _check(config: RouterConfig) -> None:
    server = config.server
    if server.port is not None and not 0 <= server.port <= 65535:
        raise ConfigError(f"--port {server.port}: must be in 0..65535")
    if (
        not config.manager.health_check_endpoint.startswith("/")
        or not config.manager.health_check_endpoint.isprintable()
    ):
        raise ConfigError(f"manager.health-check-endpoint: {config.manager.health_check_endpoint!r} must begin with /")


def _field(key: str) -> str:
    return key.replace("-", "_")


def _hint(name: str, known: Iterable[str]) -> str:
    names = list(known)
    return suggestion(name, names) or f"; there are {', '.join(names)}"
