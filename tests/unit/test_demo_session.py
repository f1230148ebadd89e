"""The demo's report, and the server process it starts; a small stand-in script takes the server's place."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdeploy.demo import server_process
from fastdeploy.demo.rank_load import RankLoad, load_table, parse_rank_load
from fastdeploy.demo.server_process import Endpoint, ServerProcess
from fastdeploy.demo.session import Answer, report, run_demo, server_environment, snippets
from fastdeploy.errors import ConfigError, EngineDeadError, EngineStartError

pytestmark = pytest.mark.timeout(60)

READY = "12:00:00 0     http://127.0.0.1:4711  http://127.0.0.1:4712/metrics  99  /log/log_0"
STAND_IN = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
print("12:00:00 loading", flush=True)
if sys.argv[1] == "fails":
    sys.exit("fastdeploy: error: no such model")
if sys.argv[1] != "hangs":
    print({READY!r}, file=sys.stderr, flush=True)
if sys.argv[1] == "dies":
    sys.exit(3)
time.sleep(60)
"""


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which the server's module is the stand-in."""
    (tmp_path / "stand_in_server.py").write_text(STAND_IN)
    monkeypatch.setattr(server_process, "MODULE", "stand_in_server")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_ready_server_is_stopped_in_order(environ: dict[str, str]) -> None:
    lines: list[str] = []
    with ServerProcess(["serves", "0"], environ, 1, lines.append) as server:
        assert server.wait_ready(30) == [Endpoint("http://127.0.0.1:4711", "http://127.0.0.1:4712/metrics")]
    assert lines == ["12:00:00 loading", READY]


def test_failed_start_shows_the_servers_own_words(environ: dict[str, str]) -> None:
    with (
        pytest.raises(EngineStartError, match=r"status 1 while starting(?s:.)*12:00:00 loading\n.*no such model"),
        ServerProcess(["fails", "0"], environ, 1, lambda _: None) as server,
    ):
        server.wait_ready(30)


def test_start_that_takes_too_long_ends_the_server(environ: dict[str, str]) -> None:
    with (
        pytest.raises(EngineStartError, match="not ready after 1 s"),
        ServerProcess(["hangs", "0"], environ, 1, lambda _: None) as server,
    ):
        pid = server._process.pid
        server.wait_ready(1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["serves", "5"], "after SIGTERM, within 30 s with status 5"), (["dies", "0"], "by itself with status 3")],
)
def test_disorderly_end_is_an_error(argv: list[str], message: str, environ: dict[str, str]) -> None:
    with (
        pytest.raises(EngineDeadError, match=message),
        ServerProcess(argv, environ, 1, lambda _: None) as server,
    ):
        server.wait_ready(30)
        if argv[0] == "dies":
            server._process.wait(30)


def test_server_ends_when_its_starter_is_killed(environ: dict[str, str]) -> None:
    code = """
import os, time
from fastdeploy.demo import server_process
server_process.MODULE = "stand_in_server"
server = server_process.ServerProcess(["serves", "0"], os.environ, 1, lambda line: None)
server.wait_ready(30)
print(server._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        server_pid = int(starter.stdout.readline())
        starter.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + 20
    while is_running(server_pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not is_running(server_pid)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie whom nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_report_has_every_answer_and_a_table_of_both_ranks() -> None:
    answers = [Answer("first", "shown already", 5, 0.5, 2.5), Answer("你好", "one\n\ntwo\n", 11, 1.0, 3.0)]
    others = [Answer("first", "something else", 5, 0.75, 2.75), Answer("你好", "one\n\ntwo\n", 11, 2.0, 4.0)]
    lines = report([answers, others], 4.0)
    text = "\n".join(lines)
    assert "shown already" not in text
    assert "[2] 你好\n    one\n    two\n    (11 tokens, the first after 1.00 s, then 5.0 tokens/s)" in text
    table = [line.split() for line in lines if line.startswith(" [")]
    assert table == [
        ["[1]", "5", "0.50", "s", "2.0", "0.75", "s", "2.0", "first"],
        ["[2]", "11", "1.00", "s", "5.0", "2.00", "s", "5.0", "你好"],
    ]
    assert "4 requests at once: 32 tokens in 4.0 s, 8.0 tokens/s together" in text
    assert "1 of 2 answers are the same text on all 2 ranks" in text


def test_load_table_is_read_from_metrics() -> None:
    text = """
fastdeploy:prompt_tokens_total 17.0
fastdeploy:generation_tokens_total 32.0
fastdeploy:dp_rank_running_tokens{dp_rank="0"} 5.0
fastdeploy:expert_tokens_total{expert="2"} 30.0
fastdeploy:expert_tokens_total{expert="3"} 10.0
"""
    load = parse_rank_load(text)
    assert load == RankLoad(17, 32, {2: 30, 3: 10})
    table = "\n".join(load_table([load, RankLoad(1, 2, {0: 60})]))
    assert "rank 0      17         32   2: 30%  3: 10%" in table
    assert "rank 1       1          2   0: 60%" in table


def test_rate_of_a_single_token_is_zero() -> None:
    assert Answer("p", "t", 1, 0.5, 0.5).tokens_per_s == 0


def test_environment_keeps_keys_out() -> None:
    assert server_environment({"FD_API_KEY": "k", "HOME": "/h"}) == {"HOME": "/h"}


def test_snippets_are_for_the_address_given() -> None:
    text = snippets("http://127.0.0.1:81")
    assert "curl http://127.0.0.1:81/v1/chat/completions" in text
    assert 'base_url="http://127.0.0.1:81/v1"' in text


def test_demo_refuses_no_tokens() -> None:
    with pytest.raises(ConfigError, match="--max-tokens 0: must be at least 1"):
        run_demo(0, io.StringIO())
