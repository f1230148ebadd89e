"""A router in front of synthetic servers, all as real processes on free ports of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from network_namespaces import Machine

HOST = "127.0.0.1"
START_S = 300.0
STOP_S = 30.0


class Program:
    """`python -m MODULE FLAGS` whose console goes to a file."""

    def __init__(self, module: str, flags: Sequence[str], folder: Path, machine: Machine | None = None) -> None:
        """On this machine, or on another one of `network_namespaces`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._log = folder / "console.txt"
        environ = {**os.environ, "FD_LOG_DIR": str(folder / "log")}
        args = ["-m", module, *flags]
        if machine is not None:
            environ["FD_HOST_IP"] = machine.address
            args = machine.command(args)
        with self._log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, *args], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environ
            )

    @property
    def console(self) -> str:
        """What was printed so far."""
        return self._log.read_text()

    def wait_for(self, pattern: str, seconds: float = START_S) -> str:
        """The first group of `pattern` once it is printed. Raises RuntimeError when it does not come."""
        deadline_s = time.monotonic() + seconds
        while (found := re.search(pattern, self.console)) is None:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no {pattern!r} on the console of {self.folder.name}: {self.last_words()}")
            time.sleep(0.05)
        return found[1]

    def last_words(self) -> str:
        """Whether it runs, and the ends of its console and its log files."""
        status = self.process.poll()
        texts = ["it runs" if status is None else f"it ended with {status}", self.console[-2000:]]
        logs = sorted(path for path in (self.folder / "log").rglob("*") if path.is_file())
        texts += [f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in logs]
        return "\n".join(texts)

    def kill(self) -> None:
        """SIGKILL, as a crash; its children follow by themselves."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask, then kill."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_S / 3)
                return
            except subprocess.TimeoutExpired:
                continue


class Router(Program):
    """fd-router with the keys of `scheduler` in its configuration file."""

    def __init__(self, folder: Path, scheduler: Mapping[str, object], port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(json.dumps({"scheduler": dict(scheduler)}))  # JSON is YAML
        flags = ["--host", HOST, "--port", str(port), "--config-path", str(config)]
        super().__init__("fastdeploy.router.launch", flags, folder)
        self.url = self.wait_for(r"Starting server on (http://[^\s,]+)")

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.url.removeprefix("http://")

    def n_servers(self) -> int:
        """Servers registered."""
        return int(json.loads(get(f"{self.url}/registered_number"))["mixed"])


class SyntheticServer(Program):
    """api_server without a model."""

    def __init__(self, folder: Path, pace: Mapping[str, float], router: str, flags: Sequence[str] = ()) -> None:
        all_flags = ["--load-choices", "synthetic", "--synthetic-config", json.dumps(dict(pace))]
        all_flags += ["--host", HOST, "--port", "0", "--router", router, *flags]
        super().__init__("fastdeploy.entrypoints.openai.api_server", all_flags, folder)

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        return self.wait_for(r"ready at (http://\S+)")


class Fleet:
    """A router and servers, one for each pace, registered when the `with` block begins; they end with it."""

    def __init__(
        self,
        folder: Path,
        scheduler: Mapping[str, object],
        paces: Sequence[Mapping[str, float]],
        flags: Sequence[str] = (),
    ) -> None:
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.router = Router(folder / "router", scheduler)
            stack.callback(lambda: self.router.stop())  # it may have been replaced meanwhile
            self.servers = []
            for i, pace in enumerate(paces):
                server = SyntheticServer(folder / f"server{i}", pace, self.router.address, flags)
                stack.callback(server.stop)
                self.servers.append(server)
            self.urls = [server.url for server in self.servers]
            self.wait_registered()
            self._stack = stack.pop_all()

    def wait_registered(self, seconds: float = START_S) -> float:
        """Until the router knows all servers; returns how long that took."""
        start_s = time.monotonic()
        while (n_there := self.router.n_servers()) < len(self.servers):
            if time.monotonic() - start_s > seconds:
                raise RuntimeError(f"{n_there} of {len(self.servers)} servers are registered after {seconds:.0f} s")
            time.sleep(0.05)
        return time.monotonic() - start_s

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()


def get(url: str) -> str:
    """Body of a GET. Raises URLError."""
    with urllib.request.urlopen(url, timeout=30) as response:
        body: bytes = response.read()
    return body.decode()


def metrics_of(url: str) -> dict[str, float]:
    """The samples of a page of metrics, by name with labels."""
    found = {}
    for line in get(f"{url}/metrics").splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found
