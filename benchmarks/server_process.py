"""The real API server as a child process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.error import URLError

HOST = "127.0.0.1"
POLL_S = 0.02
STOP_TIMEOUT_S = 60.0
N_LOG_LINES_SHOWN = 25


class ServerProcess:
    """`api_server` with `flags` on a free port, ready when the `with` block begins."""

    def __init__(self, flags: Sequence[str], environ: Mapping[str, str], timeout_s: float = 300.0) -> None:
        self.port = _free_port()
        self._log = tempfile.NamedTemporaryFile("w+", suffix="-api_server.log")  # noqa: SIM115 - closed in close()
        command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
        command += ["--host", HOST, "--port", str(self.port), *flags]
        start_s = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=dict(environ), start_new_session=True
        )
        try:
            self._wait_healthy(start_s + timeout_s)
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - start_s  # process start to the first 200 of /health

    @property
    def pid(self) -> int:
        """Root of the server's process tree."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return Path(self._log.name).read_text()

    def get(self, path: str) -> str:
        """Body of a GET. Raises URLError (HTTPError for a status that is no success)."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=30) as response:
            body: bytes = response.read()
        return body.decode()

    def close(self) -> None:
        """SIGTERM, and SIGKILL to what is left of the process group after a minute."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _wait_healthy(self, deadline_s: float) -> None:
        while time.perf_counter() < deadline_s:
            if self._process.poll() is not None:
                break
            with suppress(URLError, ConnectionError, TimeoutError):
                self.get("/health")
                return
            time.sleep(POLL_S)
        tail = "\n".join(self.log.splitlines()[-N_LOG_LINES_SHOWN:])
        raise RuntimeError(f"the server did not become healthy (exit status {self._process.poll()}):\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
