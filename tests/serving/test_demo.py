"""`fastdeploy demo` as a newcomer runs it: the real server, the real model, the real client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.timeout(600), pytest.mark.demo_model]


def start_demo(tmp_path: Path, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastdeploy.entrypoints.cli", "demo", "--max-tokens", "4"]
    env = {**os.environ, "FD_LOG_DIR": str(tmp_path / "log"), "http_proxy": "http://127.0.0.1:9", **environ}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_running(process: psutil.Process) -> bool:
    """A zombie whom nobody has waited for yet does not count."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_answers_and_leaves_nothing_running(tmp_path: Path) -> None:
    processes: list[psutil.Process] = []
    with start_demo(tmp_path) as demo:
        assert demo.stdout is not None
        lines = []
        for line in demo.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("[1]"):
                processes = psutil.Process(demo.pid).children(recursive=True)
        assert demo.wait(30) == 0, demo.stderr.read() if demo.stderr else ""
    assert len(processes) >= 7  # the supervisor, and for each rank: front end, engine core, rank
    deadline_s = time.monotonic() + 10  # the rank ends with its engine core, which may be a moment behind
    while any(map(is_running, processes)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(map(is_running, processes))
    table = [line for line in lines if line.startswith(" [")]
    assert [line.split()[:2] for line in table] == [[f"[{number}]", "4"] for number in range(1, 7)]
    assert "\x1b" not in "".join(lines)
    assert "6 of 6 answers are the same text on all 2 ranks" in lines
    assert lines[-1] == "The servers stopped in order (status 0)."


def test_failure_is_one_message_with_the_servers_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with start_demo(tmp_path, FD_LOG_DIR=str(tmp_path / "file")) as demo:
        stdout, stderr = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "ready at" not in stdout
    assert "the server ended with status 2 while starting" in stderr
    assert "set FD_LOG_DIR to a folder that can be written" in stderr
    assert "Traceback" not in stderr
