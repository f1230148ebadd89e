"""From the bound port to the last byte: start, drain on a signal, a second signal, death of the engine, busy ports."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastdeploy.entrypoints.openai.api_server import main
from fastdeploy.entrypoints.openai.server import bind
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(180)

PROMPT = {"prompt": "x", "stream": True}


class Process:
    """A server process with a fake engine."""

    def __init__(self, **options: Any) -> None:
        script = Path(__file__).with_name("http_process.py")
        self.popen = subprocess.Popen(
            [sys.executable, str(script), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.url = self.popen.stdout.readline().strip()

    def wait_for(self, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline_s = time.monotonic() + seconds
        while not holds():
            assert self.popen.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.02)

    def wait_up(self) -> None:
        self.wait_for(lambda: httpx.get(f"{self.url}/health").status_code == 200)

    def end(self, seconds: float = 60.0) -> tuple[int, str, str]:
        out, err = self.popen.communicate(timeout=seconds)
        return self.popen.returncode, out, err


@contextmanager
def running(**options: Any) -> Iterator[Process]:
    process = Process(**options)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, body: dict[str, Any] = PROMPT) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.began = threading.Event()
        self._url = url
        self._body = body
        self.start()
        assert self.began.wait(30)

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as answer:
            for piece in answer.iter_text():
                self.text += piece
                self.began.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish(number: signal.Signals) -> None:
    with running(n_tokens=20, step_s=0.1) as process:
        process.wait_up()
        reader = Reader(process.url)
        process.popen.send_signal(number)
        process.wait_for(lambda: httpx.get(f"{process.url}/health").status_code == 503)
        refused = httpx.post(f"{process.url}/v1/completions", json=PROMPT)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        reader.join(60)
        assert reader.text.count('"text":"A"') == 20 and reader.text.endswith("data: [DONE]\n\n")
        status, out, _ = process.end()
        assert status == 0 and "engine stopped" in out


def test_what_does_not_finish_in_time_is_aborted() -> None:
    with running(n_tokens=400, step_s=0.2, drain_s=0.5) as process:
        process.wait_up()
        reader = Reader(process.url)
        process.popen.send_signal(signal.SIGTERM)
        reader.join(60)
        assert '"finish_reason":"abort"' in reader.text and reader.text.endswith("data: [DONE]\n\n")
        assert process.end()[0] == 0


def test_second_signal_ends_at_once() -> None:
    with running(n_tokens=400, step_s=0.2) as process:
        process.wait_up()
        reader = Reader(process.url)
        process.popen.send_signal(signal.SIGINT)
        process.wait_for(lambda: httpx.get(f"{process.url}/health").status_code == 503)
        process.popen.send_signal(signal.SIGINT)
        status, out, _ = process.end()
        assert status == 130 and "engine stopped" in out
        reader.join(60)
        assert not reader.is_alive()


def test_idle_server_stops_although_a_client_keeps_its_connection() -> None:
    with running() as process, httpx.Client() as client:
        process.wait_up()
        client.get(f"{process.url}/health")
        process.popen.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


def test_health_while_the_engine_starts_and_a_signal_then() -> None:
    with running(start_s=60) as process:
        answer = httpx.get(f"{process.url}/health")
        assert answer.status_code == 503 and "starting: fake" in answer.json()["error"]["message"]
        process.popen.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


def test_engine_that_does_not_start() -> None:
    with running(start_s=0.2, start_error="no memory for weights") as process:
        status, _, err = process.end()
    assert (status, err) == (1, "fastdeploy: error: no memory for weights\n")


def test_engine_that_dies() -> None:
    with running(n_tokens=400, step_s=0.05) as process:
        process.wait_up()
        reader = Reader(process.url)
        answer = httpx.post(f"{process.url}/v1/completions", json={"prompt": "die!"}, timeout=60)
        assert answer.status_code == 503 and "killed by signal 9" in answer.json()["error"]["message"]
        reader.join(60)
        *_, failure, _, _ = reader.text.split("\n\n")
        assert "killed by signal 9" in json.loads(failure.removeprefix("data: "))["error"]["message"]
        status, _, err = process.end()
    assert status == 1 and err.splitlines()[-1] == "fastdeploy: error: rank 0 was killed by signal 9"


def test_busy_port_is_reported_before_the_model_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = main(["--model", "/no/such/model", "--host", "127.0.0.1", "--port", str(port)])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and f"--port {port}" in line and "in use" in line.lower()


def test_busy_metrics_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--model", "/no/such/model", "--host", "127.0.0.1", "--port", "0", "--metrics-port", str(port)]
        assert main(flags) == 2
    assert f"--metrics-port {port}" in capsys.readouterr().err


def test_host_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0, "--port")


def test_model_that_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path))
    assert main(["--model", str(tmp_path / "none"), "--host", "127.0.0.1", "--port", "0"]) == 2
    assert "none" in capsys.readouterr().err
