"""Log files of a server: one folder, several processes, a new file every day.

| file | content |
| --- | --- |
| fastdeploy.log | everything, from every process |
| api_server.log | what the front end logs: start arguments, requests |
| multi_api_server.log | what the supervisor of several servers logs |
| scheduler.log | what a waiting room shared through Redis logs |
| router.log | what fd-router logs |
| console.log | start-up and status lines, as on the console |
| workerlog.<n> | what rank n logs |

Each name is a symbolic link to today's file, `<name>.<date>`. Nothing is ever renamed while somebody writes: a process
that finds itself in a new day opens the new file and points the link there, so many processes may share a file.
FD_LOG_BACKUP_COUNT (7) is the number of days kept, FD_DEBUG=1 writes debug records.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from datetime import date
from pathlib import Path
from typing import Any, TextIO

from fastdeploy.errors import ConfigError

ROOT = "fastdeploy"
CONSOLE = "fastdeploy.console"  # logger of what belongs in console.log
CONSOLE_FILE = "console.log"
SCHEDULER_FILE = "scheduler.log"
_ONE_LOGGER = {CONSOLE_FILE: CONSOLE, SCHEDULER_FILE: "fastdeploy.scheduler"}  # files of one logger each
DEFAULT_DAYS_KEPT = 7
# Roots of process trees: their console is what people watch.
PARENTS = ("api_server", "multi_api_server", "router")


class DailyFileHandler(logging.Handler):
    """Appends whole lines to `<folder>/<name>.<date>` and keeps the link `<folder>/<name>` on it.

    A record is one write, so lines of several processes do not mix. When the disk refuses lines, they are dropped,
    stderr says so once, and the number lost is logged when writing works again. Raises OSError when the file cannot be
    opened.
    """

    def __init__(self, folder: Path, name: str, days_kept: int = DEFAULT_DAYS_KEPT) -> None:
        super().__init__()
        self._folder = folder
        self._name = name
        self._days_kept = days_kept
        self._day = ""
        self._fd = -1
        self._n_lost = 0
        self._turn_to(_day_of(time.time()))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            line = self.format(record) + "\n"
        except Exception:
            self.handleError(record)  # a record that cannot be formatted is the caller's bug: logging reports it
            return
        try:
            day = _day_of(record.created)
            if day > self._day:
                self._turn_to(day)
            if self._n_lost:
                line = f"({self._n_lost} log lines lost: they could not be written)\n{line}"
            os.write(self._fd, line.encode("utf-8", "backslashreplace"))
            self._n_lost = 0
        except OSError as exc:
            if self._n_lost == 0:
                print(f"fastdeploy: cannot write {self._folder / self._name}: {exc}", file=sys.stderr)
            self._n_lost += 1

    def close(self) -> None:
        """Close the file."""
        with self.lock or contextlib.nullcontext():
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        super().close()

    def _turn_to(self, day: str) -> None:
        path = self._folder / f"{self._name}.{day}"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._day = fd, day
        self._point_link_at(path.name)
        self._remove_old()

    def _point_link_at(self, target: str) -> None:
        link = self._folder / self._name
        if link.exists() and not link.is_symlink():  # a plain file that somebody else left under this name
            with contextlib.suppress(FileNotFoundError):  # another process may have been first
                link.rename(self._folder / f"{self._name}.found-{time.time_ns()}")
        new = self._folder / f".{self._name}.{os.getpid()}.{id(self):x}"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)

    def _remove_old(self) -> None:
        dated = sorted(
            path for path in self._folder.glob(f"{self._name}.*") if _is_day(path.name[len(self._name) + 1 :])
        )
        oldest_kept = date.fromisoformat(self._day).toordinal() - self._days_kept
        for path in dated:
            if date.fromisoformat(path.name[len(self._name) + 1 :]).toordinal() < oldest_kept:
                path.unlink(missing_ok=True)  # another process may have been first


def _day_of(created_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(created_s))


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class _FileFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO [core 4711] fastdeploy.engine.core: (request-id) text`."""

    def __init__(self, process_name: str) -> None:
        escaped = process_name.replace("%", "%%")
        super().__init__(f"%(asctime)s %(levelname)s [{escaped} %(process)d] %(name)s: %(request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        record.request = f"({request_id}) " if request_id else ""
        return super().format(record)


class _ConsoleFormatter(logging.Formatter):
    """`12:00:00 text`; the process where it is not the front end, the level where it is more than information."""

    def __init__(self, process_name: str) -> None:
        super().__init__("%(asctime)s %(origin)s%(message)s", "%H:%M:%S")
        self._process = "" if process_name in PARENTS else f"{process_name}: "

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        request_id = getattr(record, "request_id", None)
        record.origin = f"{self._process}{level}" + (f"({request_id}) " if request_id else "")
        return super().format(record)


def _for_console(record: logging.LogRecord) -> bool:
    """A line for every request would drown what people watch the console for."""
    return record.name == CONSOLE or record.levelno >= logging.WARNING


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records carry `request_id`."""

    def __init__(self, logger: logging.Logger, request_id: str) -> None:
        super().__init__(logger, {"request_id": request_id})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the id to what the caller gave."""
        return msg, {**kwargs, "extra": {**(kwargs.get("extra") or {}), **(self.extra or {})}}


def setup_logging(
    log_dir: str,
    process_name: str,
    console: bool = True,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Send the records of all `fastdeploy` loggers to the files of this process and, if asked for, to the console.

    `process_name` ("api_server", "core0", "rank3") goes in front of every line and chooses the files; `stream` is the
    console, stderr if None. Calling it again replaces what the call before set up. Raises ConfigError when `log_dir`
    cannot be written or FD_LOG_BACKUP_COUNT is no whole number.
    """
    days_kept = _days_kept(environ)
    level = logging.DEBUG if environ.get("FD_DEBUG", "0") not in ("", "0") else logging.INFO
    folder = Path(log_dir).expanduser()
    handlers: list[logging.Handler] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*_file_names(process_name), CONSOLE_FILE):
            handler = DailyFileHandler(folder, name, days_kept)
            handlers.append(handler)
            handler.setFormatter(_FileFormatter(process_name))
            if name in _ONE_LOGGER:
                handler.addFilter(logging.Filter(_ONE_LOGGER[name]))
    except OSError as exc:
        for opened in handlers:
            opened.close()
        raise ConfigError(
            f"log folder {folder.absolute()}: {exc.strerror or exc}; set FD_LOG_DIR to a folder that can be written"
        ) from exc
    if console:
        printer = logging.StreamHandler(stream or sys.stderr)
        printer.setFormatter(_ConsoleFormatter(process_name))
        if level > logging.DEBUG:
            printer.addFilter(_for_console)
        handlers.append(printer)
    root = logging.getLogger(ROOT)
    close_logging()
    for opened in handlers:
        root.addHandler(opened)
    root.setLevel(level)
    root.propagate = not console  # otherwise a root handler would print every line a second time


def close_logging() -> None:
    """Undo `setup_logging`: close its files and take its handlers away."""
    root = logging.getLogger(ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = True


def _file_names(process_name: str) -> tuple[str, ...]:
    if process_name == "api_server":
        return ("fastdeploy.log", "api_server.log", SCHEDULER_FILE)
    if process_name in PARENTS:
        return ("fastdeploy.log", f"{process_name}.log")
    if process_name.startswith("rank") and process_name[4:].isdecimal():
        return ("fastdeploy.log", f"workerlog.{process_name[4:]}")
    return ("fastdeploy.log",)


def _days_kept(environ: Mapping[str, str]) -> int:
    text = environ.get("FD_LOG_BACKUP_COUNT") or str(DEFAULT_DAYS_KEPT)
    if not text.isdecimal():
        raise ConfigError(f"FD_LOG_BACKUP_COUNT={text}: must be a whole number of days")
    return int(text)
