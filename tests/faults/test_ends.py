"""The ends of a server with a real engine: signals, and an exception inside the model."""

import signal
import sys
from pathlib import Path

import pytest
from processes import serving, streams, wait_for

sys.path.insert(0, str(Path(__file__).with_name("injected")))
from sitecustomize import BROKEN

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_running_requests_finish(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serving(model, tmp_path / "run") as server:
        running = streams(server, 3, max_tokens=100)
        server.popen.send_signal(number)
        assert server.end() == 0
        for stream in running:
            stream.join(10)
            assert not stream.failed and stream.text.count('"finish_reason":"length"') == 1
            assert stream.text.endswith("data: [DONE]\n\n")
        server.check_nothing_left()


def test_second_signal_ends_at_once(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "run", "--max-model-len", "4096") as server:
        running = streams(server, 8)
        server.popen.send_signal(signal.SIGTERM)
        wait_for(lambda: "shutting down" in server.console)
        server.popen.send_signal(signal.SIGTERM)
        assert server.end(10) == 130
        for stream in running:
            stream.join(10)
            assert not stream.is_alive() and '"finish_reason":"length"' not in stream.text
        server.check_nothing_left()


def test_exception_in_the_model(model: Path, tmp_path: Path, saboteur: dict[str, str]) -> None:
    with serving(model, tmp_path / "run", "--max-model-len", "4096", env=saboteur) as server:
        running = streams(server, 3)
        answer = server.complete(prompt=BROKEN)
        cause = "rank 0: RuntimeError: injected: the forward pass broke"
        assert answer.status_code == 503 and cause in answer.json()["error"]["message"]
        assert server.end(10) == 1
        for stream in running:
            stream.join(10)
            assert stream.failed and cause in stream.text
        assert server.console.splitlines()[-1] == f"fastdeploy: error: {cause}"
        assert "Traceback" not in server.console
        assert "Traceback" in (server.folder / "log" / "workerlog.0").read_text()
        server.check_nothing_left()
