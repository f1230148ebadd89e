"""multi_api_server with real servers: they answer, they come back, they drain, and nothing is left of them."""

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from processes import PATIENCE_S, Process, Stream, wait_for
from safetensors.torch import load_file, save_file
from tiny_models import WEIGHTS_FILE

pytestmark = pytest.mark.timeout(180)

MODULE = "fastdeploy.entrypoints.openai.multi_api_server"
CHILD = "fastdeploy.entrypoints.supervise.child_main"
ROW = re.compile(r"(\d)  +(http://\S+)  +(http://\S+)/metrics  +(\d+)  +(\S+)$", re.MULTILINE)
BACK = re.compile(r"server (\d) is back at (http://\S+), pid (\d+)")
MAX_LEN = 16384


class Group(Process):
    """Two servers under a supervisor."""

    def __init__(self, model: Path, folder: Path, *own: str, flags: tuple[str, ...] = ()) -> None:
        shared = ("--model", str(model), "--host=127.0.0.1", "--device=cpu", "--dtype=float32", *flags)
        args = ("-m", MODULE, *own, "--args", *shared, "--data-parallel-size", "2", "--max-model-len", str(MAX_LEN))
        super().__init__(args, folder)
        self.urls: list[str] = []
        self.metrics_urls: list[str] = []
        self.log_dirs: list[Path] = []

    def wait_ready(self) -> None:
        """Until the table is there."""
        wait_for(lambda: len(ROW.findall(self.console)) == 2 or self.popen.poll() is not None, what="the table")
        rows = ROW.findall(self.console)
        assert [row[0] for row in rows] == ["0", "1"], self.console
        self.urls, self.metrics_urls = [row[1] for row in rows], [row[2] for row in rows]
        self.log_dirs = [Path(row[4]) for row in rows]
        self.tree()

    def front_end(self, rank: int) -> psutil.Process:
        """The living server of a rank."""

        def find() -> psutil.Process | None:
            for child in self.root.children():
                with suppress(psutil.Error):  # it has just ended
                    line = child.cmdline()
                    if CHILD in line and line[line.index("--local-data-parallel-id") + 1] == str(rank):
                        return child
            return None

        found: psutil.Process = wait_for(find, what=f"server {rank}")
        return found

    def wait_back(self, rank: int, n_before: int) -> None:
        """Until a server has come back once more."""
        wait_for(lambda: self.n_back(rank) > n_before, what=f"server {rank} to be back: {self.console}")
        assert BACK.findall(self.console)[-1][1] == self.urls[rank]

    def n_back(self, rank: int) -> int:
        """How often it came back."""
        return [found[0] for found in BACK.findall(self.console)].count(str(rank))

    def check_nothing_left(self, seconds: float = 10.0) -> None:
        """Neither a process nor a port."""
        wait_for(lambda: not self.alive(), seconds, "every process to end")
        assert list(self.tmp.iterdir()) == []
        # A process counts as ended with its first thread; the others may hold its sockets a moment longer.
        for url in (*self.urls, *self.metrics_urls):
            wait_for(partial(_refuses, int(url.rpartition(":")[2])), seconds, f"{url} to be free")


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionError:
        return True
    return False


@contextmanager
def group(model: Path, folder: Path, *own: str, flags: tuple[str, ...] = ()) -> Iterator[Group]:
    servers = Group(model, folder, *own, flags=flags)
    try:
        yield servers
    finally:
        servers.kill()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """An answer of its whole length takes longer than any test looks at it."""
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=MAX_LEN, num_hidden_layers=8)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group(
        model, tmp_path_factory.mktemp("group") / "run", "--ports", "0,0", flags=("--enable-expert-parallel",)
    ) as servers:
        servers.wait_ready()
        yield servers


def complete(url: str, **body: object) -> httpx.Response:
    wanted = {"prompt": "the", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{url}/v1/completions", json=wanted, timeout=PATIENCE_S)


def texts(servers: Group) -> list[str]:
    """What each answers, once each answers."""

    def ask() -> list[str]:
        answers = [complete(url) for url in servers.urls]
        return [answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200]

    found: list[str] = wait_for(lambda: found if len(found := ask()) == len(servers.urls) else None, what="answers")
    return found


def test_each_port_answers_alike_and_has_metrics_and_logs_of_its_own(running: Group) -> None:
    first, second = texts(running)
    assert first == second != ""
    for url in running.metrics_urls:
        assert "fastdeploy:num_requests_running" in httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    assert len({*running.urls, *running.metrics_urls}) == 4
    assert [folder.name for folder in running.log_dirs] == ["log_0", "log_1"]
    for folder in running.log_dirs:
        assert (folder / "api_server.log").exists() and "ready at" in (folder / "api_server.out").read_text()
    assert os.getpgid(running.front_end(0).pid) != os.getpgid(running.root.pid)  # Ctrl-C is for the supervisor
    assert "ready after" in (running.folder / "log" / "multi_api_server.log").read_text()


def test_killed_server_is_named_and_comes_back(running: Group) -> None:
    expected = texts(running)
    n_before, victim = running.n_back(0), running.front_end(0)
    victim.kill()
    running.wait_back(0, n_before)
    named = f"server 0 (pid {victim.pid}) was killed by SIGKILL; its last lines in {running.log_dirs[0]}"
    assert named in running.console
    assert texts(running) == expected


def test_stopped_server_is_killed_and_comes_back(running: Group) -> None:
    expected = texts(running)
    n_before, victim = running.n_back(1), running.front_end(1)
    victim.send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    running.wait_back(1, n_before)
    assert f"server 1 (pid {victim.pid}) did not answer GET /health for" in running.console
    assert time.monotonic() - start_s < PATIENCE_S
    assert texts(running) == expected


def test_sigterm_lets_requests_finish(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path / "run", "--ports", "0,0") as servers:
        servers.wait_ready()
        streams = [Stream(url, max_tokens=200) for url in servers.urls]
        assert all(stream.began.wait(PATIENCE_S) for stream in streams)
        servers.popen.terminate()
        for stream in streams:
            stream.join(PATIENCE_S)
            assert not stream.failed
        assert servers.end() == 0
        servers.check_nothing_left()


def test_second_signal_ends_requests(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path / "run", "--ports", "0,0") as servers:
        servers.wait_ready()
        streams = [Stream(url, max_tokens=MAX_LEN - 100) for url in servers.urls]
        assert all(stream.began.wait(PATIENCE_S) for stream in streams)
        servers.popen.send_signal(signal.SIGINT)
        wait_for(lambda: "shutting down" in servers.console)
        servers.popen.send_signal(signal.SIGINT)
        assert servers.end() == 130
        for stream in streams:
            stream.join(PATIENCE_S)
            assert not stream.is_alive() and '"finish_reason":"length"' not in stream.text
        servers.check_nothing_left()


def test_killed_supervisor_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path / "run", "--ports", "0,0") as servers:
        servers.wait_ready()
        assert len(servers.tree()) == 7
        servers.front_end(0).send_signal(signal.SIGSTOP)  # a stopped one cannot see that it is alone
        servers.popen.kill()
        assert servers.end() == -signal.SIGKILL
        servers.check_nothing_left()


def test_without_restarts_a_death_ends_all(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path / "run", "--restart", "never", "--ports", "0,0") as servers:
        servers.wait_ready()
        victim = servers.find("fastdeploy.engine.core")
        victim.kill()
        assert servers.end() == 1
        assert re.search(r"fastdeploy: error: server \d \(pid \d+\) ended with status 1", servers.console)
        assert f"(pid {victim.pid}) was killed by SIGKILL" in servers.console
        servers.check_nothing_left()


def test_start_that_fails_is_told_once(model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(broken / WEIGHTS_FILE)
    del tensors["model.norm.weight"]
    save_file(tensors, broken / WEIGHTS_FILE)
    with group(broken, tmp_path / "run", "--ports", "0,0") as servers:
        assert servers.end() in (1, 2)
        servers.check_nothing_left()
    errors = [line for line in servers.console.splitlines() if line.startswith("fastdeploy: error: ")]
    assert len(errors) == 1 and re.match(r"fastdeploy: error: server \d: .*model.norm.weight", errors[0]), (
        servers.console
    )


def test_wrong_commands_start_nothing(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with group(model, tmp_path / "busy", "--ports", f"0,{port}") as servers:
            assert servers.end() == 2
        assert f"fastdeploy: error: --ports {port}: Address already in use" in servers.console
    with group(model, tmp_path / "counts", "--ports", "0,0,0") as servers:
        assert servers.end() == 2
    assert "Number of ports must match num-servers" in servers.console
    assert not list(tmp_path.glob("*/log/log_*"))
