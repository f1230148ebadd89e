"""Real processes for tests: an api_server or a script with all its descendants, and what they leave behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

API_SERVER = ("-m", "fastdeploy.entrypoints.openai.api_server")
CPU_FLAGS = ("--device", "cpu", "--dtype", "float32")
READY = re.compile(r"ready at (http://\S+)")
PATIENCE_S = 60.0  # for what should take a second or a few, on a machine that is busy with other things


def wait_for(holds: Callable[[], Any], seconds: float = PATIENCE_S, what: str = "") -> Any:
    """The first true value of `holds`, which is asked again and again; an AssertionError after `seconds`."""
    deadline_s = time.monotonic() + seconds
    while True:
        value = holds()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"not within {seconds:.0f} s: {what or holds}"
        time.sleep(0.05)


class Process:
    """`python ARGS` in a folder of its own, with its temporary files, its logs and its console in there."""

    def __init__(self, args: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.tmp, self.console_file = folder / "tmp", folder / "console.txt"
        self.tmp.mkdir(parents=True)
        own = {"FD_LOG_DIR": str(folder / "log"), "TMPDIR": str(self.tmp)}
        with self.console_file.open("wb") as sink:
            self.popen = subprocess.Popen(
                [sys.executable, *args],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **own, **(env or {})},
            )
        self.root = psutil.Process(self.popen.pid)
        self._seen: dict[int, psutil.Process] = {}

    @property
    def console(self) -> str:
        """All that was printed so far."""
        return self.console_file.read_text()

    def tree(self) -> list[psutil.Process]:
        """Every process of the tree that was ever looked at, the dead ones too."""
        for process in self._alive_tree():
            self._seen.setdefault(process.pid, process)
        return list(self._seen.values())

    def find(self, module: str) -> psutil.Process:
        """The living descendant that runs `module`."""
        return wait_for(lambda: self._find(module), what=f"a process of {module}")

    @property
    def core(self) -> psutil.Process:
        return self.find("fastdeploy.engine.core")

    @property
    def rank(self) -> psutil.Process:
        return self.find("fastdeploy.executor.worker")

    def end(self, seconds: float = PATIENCE_S) -> int:
        """Waits for the exit status."""
        return self.popen.wait(seconds)

    def check_nothing_left(self, seconds: float = 10.0) -> None:
        """All processes seen are gone, within `seconds`, and so are their temporary files."""
        wait_for(lambda: not self.alive(), seconds, f"{[p.pid for p in self.alive()]} to end")
        assert list(self.tmp.iterdir()) == []

    def shared_memory(self) -> list[str]:
        """Names in /dev/shm that somebody of the tree has open or mapped, and that would outlive a kill."""
        found = []
        for process in self.alive():
            mapped = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
            opened = [str(path.readlink()) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
            found += [name for name in mapped + opened if "/dev/shm" in name and not name.endswith("(deleted)")]
        return found

    def alive(self) -> list[psutil.Process]:
        """The processes of the tree that still run."""
        return [process for process in self.tree() if _runs(process)]

    def kill(self) -> None:
        """The end of all of them, for the end of a test."""
        for process in self.tree():
            if _runs(process):
                process.kill()
        self.popen.kill()
        self.popen.wait()

    def _alive_tree(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _find(self, module: str) -> psutil.Process | None:
        for process in self.tree():
            if _runs(process) and module in process.cmdline():
                return process
        return None


class Server(Process):
    """A running api_server."""

    def __init__(self, model: Path, folder: Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        args = (*API_SERVER, "--model", str(model), "--host", "127.0.0.1", "--port", "0", *CPU_FLAGS, *flags)
        super().__init__(args, folder, env)
        self.url = ""

    def wait_ready(self) -> None:
        """Until it takes requests."""
        found = wait_for(lambda: READY.search(self.console) or self.popen.poll() is not None, what="ready")
        assert found is not True, f"the server ended: {self.console}"
        self.url = found[1]

    def health(self) -> int:
        """Status of /health."""
        return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code

    def health_text(self) -> str:
        """The reason that /health gives."""
        return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).text

    def metric(self, name: str) -> float:
        """A metric without labels, by its name behind the prefix."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        found = re.search(rf"^fastdeploy:{name} (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return float(found[1])

    def complete(self, **body: Any) -> httpx.Response:
        """One plain completion."""
        wanted = {"prompt": "the", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=wanted, timeout=PATIENCE_S)

    def check_nothing_left(self, seconds: float = 10.0) -> None:
        """Neither a process nor a file nor a port."""
        super().check_nothing_left(seconds)
        if self.url:
            try:
                httpx.get(f"{self.url}/health", timeout=5)
            except httpx.TransportError:
                return
            raise AssertionError(f"somebody still answers at {self.url}")


class Stream(threading.Thread):
    """Reads one streamed completion to its end: `ended` says how, `text` is what came."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.ended = ""
        self.began = threading.Event()
        self._url = f"{url}/v1/completions"
        self._body = {"prompt": "once", "max_tokens": 4000, "ignore_eos": True, "stream": True, **body}
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE_S) as answer:
                for piece in answer.iter_text():
                    self.text += piece
                    self.began.set()
            self.ended = "done" if answer.status_code == 200 else f"status {answer.status_code}"
        except httpx.HTTPError as error:
            self.ended = f"cut: {error!r}"
        self.began.set()

    @property
    def failed(self) -> bool:
        """Whether it ended without its answer being complete."""
        return '"error"' in self.text or self.ended != "done"


def streams(server: Server, n: int, **body: Any) -> list[Stream]:
    """`n` streams that have all begun."""
    started = [Stream(server.url, **body) for _ in range(n)]
    for stream in started:
        assert stream.began.wait(PATIENCE_S)
    return started


@contextmanager
def serving(model: Path, folder: Path, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that takes requests; whatever is left of it at the end is killed."""
    server = Server(model, folder, *flags, env=env)
    try:
        server.wait_ready()
        server.tree()
        yield server
    finally:
        server.kill()


def send(process: psutil.Process, number: signal.Signals) -> None:
    """A signal to a process of the tree."""
    process.send_signal(number)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
