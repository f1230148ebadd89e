"""`bench serve` against a real api_server, against the real app that refuses, and against servers that misbehave."""

from __future__ import annotations

import json
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeGenerator
from fake_engine import serving as serving_fake
from processes import Server, serving, wait_for

from fastdeploy.entrypoints import cli
from fastdeploy.entrypoints.openai.state import Slots

pytestmark = pytest.mark.timeout(180)

PAGE_TOKENS = 16
FLAGS = ("--block-size", str(PAGE_TOKENS), "--max-num-seqs", "4", "--max-model-len", "1024")
VOCAB_SIZE = 128


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("server") / "s", *FLAGS) as running:
        yield running


class Bench:
    """Runs `fastdeploy bench serve` in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file = folder / "result.json"
        self.err = self.out = ""
        self.notes: list[str] = []
        self._capsys = capsys

    def __call__(self, url: str, *flags: str, status: int = 0) -> dict[str, Any]:
        """The first result of a run that ends with `status`."""
        argv = ["bench", "serve", "--base-url", url, "--no-progress", "--output", str(self.file), *flags]
        found = cli.main(argv)
        self.out, self.err = self._capsys.readouterr()
        assert found == status, self.out + self.err
        content = json.loads(self.file.read_text())
        self.notes = content["notes"]
        result: dict[str, Any] = content["results"][0]
        return result


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def lengths(n: int, n_input: int, n_output: int) -> tuple[str, ...]:
    return ("--requests", str(n), "--input-len", str(n_input), "--output-len", str(n_output))


# ---- a real server ---------------------------------------------------------------------------------------------------


def test_closed_loop(server: Server, bench: Bench) -> None:
    flags = (*lengths(9, 20, 6), "--concurrency", "3", "--vocab-size", str(VOCAB_SIZE), "--raw")
    result = bench(f"{server.url}/v1", *flags, "--goodput", "ttft:600000", "tpot:600000")
    assert (result["n_sent"], result["n_answered"], result["n_failed"]) == (9, 9, 0)
    assert (result["input_tokens"], result["output_tokens"], result["n_wrong_length"]) == (180, 54, 0)
    assert result["peak_concurrency"] == 3 and result["goodput_share"] == 1.0
    assert result["output_tokens_per_s"] == pytest.approx(54 / result["seconds"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert 0 <= result[name]["min"] <= result[name]["p50"] <= result[name]["p99"] <= result[name]["max"]
    assert result["e2e_ms"]["max"] <= result["seconds"] * 1000
    assert [one["index"] for one in result["requests"]] == list(range(9))
    starts, ends = [one["start_s"] for one in result["requests"]], [one["end_s"] for one in result["requests"]]
    assert sorted(starts)[3] >= min(ends)  # the fourth waits for one of three
    assert "9 / 9 / 0" in bench.out and "time to first token (TTFT)" in bench.out
    assert bench.notes[0] == "the vocabulary has 128 tokens: prompt ids are folded into 10..127"


def test_open_loop_at_random_times(server: Server, bench: Bench) -> None:
    flags = (*lengths(8, 20, 4), "--request-rate", "40", "--burstiness", "0.5", "--vocab-size", str(VOCAB_SIZE))
    result = bench(server.url, *flags)
    assert result["n_answered"] == 8 and result["output_tokens"] == 32
    assert result["load"] == {"mode": "open loop", "request_rate": 40.0, "burstiness": 0.5}


def test_a_trace_keeps_its_times_and_its_shared_prefixes(server: Server, bench: Bench, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 600 * i, "input_length": 512 * 3, "output_length": 64, "hash_ids": [5, 6, 100 + i]}
        for i in range(3)
    ]
    trace = tmp_path / "m.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    flags = ("--trace", str(trace), "--length-scale", "0.0625", "--vocab-size", str(VOCAB_SIZE), "--raw")
    result = bench(server.url, *flags)
    assert (result["n_answered"], result["input_tokens"], result["output_tokens"]) == (3, 3 * 96, 3 * 4)
    starts = [one["start_s"] for one in result["requests"]]
    assert all(start >= 0.6 * i for i, start in enumerate(starts))
    # The first two blocks of 32 tokens are the same in all three; the last request comes long after the first.
    assert result["requests"][0]["cached_tokens"] == 0 and result["requests"][2]["cached_tokens"] == 64
    assert result["cached_tokens"] >= 64 and "prefix cache" in bench.out


def test_azure_trace_and_chat(server: Server, bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "a.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0000000,40,3\n2023-11-16 18:00:09.0,50,2\n"
    )
    flags = ("--trace", str(trace), "--time-scale", "0.01", "--endpoint", "/v1/chat/completions")
    result = bench(server.url, *flags)
    assert result["n_answered"] == 2 and result["output_tokens"] == 5
    assert result["workload"]["time_scale"] == 0.01 and result["seconds"] >= 0.09


def test_what_the_server_refuses_is_counted(server: Server, bench: Bench) -> None:
    flags = (*lengths(5, 20, 4), "--warmup", "0")
    result = bench(server.url, *flags, status=1)
    assert result["n_answered"] == 0 and result["n_failed"] == 5
    assert result["errors"]["http_400"]["count"] == 5
    assert "outside the vocabulary" in result["errors"]["http_400"]["first"]
    assert "failed: 5 x http_400: prompt: token id" in bench.out


def test_a_warm_up_that_fails_ends_it(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", "--base-url", server.url, "--no-progress"]) == 1
    assert capsys.readouterr().err.startswith("fastdeploy: error: the warm-up request failed: http_400: prompt: token")


def test_a_server_that_dies(model: Path, bench: Bench, tmp_path: Path) -> None:
    with serving(model, tmp_path / "dies", *FLAGS) as mortal:

        def kill_when_busy() -> None:
            wait_for(lambda: mortal.metric("num_requests_running") >= 2, what="running requests")
            mortal.root.kill()

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        flags = (*lengths(200, 20, 400), "--concurrency", "4", "--vocab-size", str(VOCAB_SIZE))
        result = bench(mortal.url, *flags, status=1)
        killer.join()
    assert "takes no connections any more" in result["stopped"] and "ended early:" in bench.out
    assert result["errors"]["disconnected"]["count"] >= 2 and result["errors"]["connect"]["count"] >= 5
    assert result["n_not_sent"] + result["n_sent"] == 200 and result["n_not_sent"] > 0


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main(["bench", "serve", "--base-url", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdeploy: error: --base-url: no answer from the server:") and "refused" in line


# ---- the real app, with an engine that does what the test says -------------------------------------------------------


def test_a_full_server_refuses_some(bench: Bench) -> None:
    slow = FakeGenerator(script=lambda ids, i: [65] * 5, step_s=0.05)
    with serving_fake(slow, slots=Slots(2)) as served:
        result = bench(served.url, *lengths(6, 10, 5), "--concurrency", "6", "--vocab-size", "256")
    assert result["errors"]["http_429"]["count"] == 4 == result["n_failed"]
    assert result["n_answered"] == 2 and result["output_tokens"] == 10


def test_an_engine_that_fails_in_the_middle(bench: Bench) -> None:
    with serving_fake(FakeGenerator(script=lambda ids, i: [65] * 9, fail_after=3)) as served:
        result = bench(served.url, *lengths(2, 10, 9), "--warmup", "0", "--vocab-size", "256", status=1)
    assert result["n_failed"] == 2 and list(result["errors"]) == ["error_event"]


def test_answers_of_another_length_are_told(bench: Bench) -> None:
    with serving_fake(FakeGenerator(script=lambda ids, i: [65] * 3)) as served:
        result = bench(served.url, *lengths(2, 10, 9), "--vocab-size", "256")
    assert result["n_answered"] == result["n_wrong_length"] == 2
    assert "lengths: 2 answers have another length than was asked for" in bench.notes


def test_ctrl_c_shows_what_there_is() -> None:
    with serving_fake(FakeGenerator(script=lambda ids, i: [65] * 400, step_s=0.1)) as served:
        argv = ["bench", "serve", "--base-url", served.url, *lengths(3, 10, 400), "--vocab-size", "256"]
        argv += ["--warmup", "0", "--no-progress"]
        process = subprocess.Popen(
            [sys.executable, "-m", "fastdeploy.entrypoints.cli", *argv], stdout=subprocess.PIPE, text=True
        )
        try:
            served.wait_until(lambda: len(served.generator.submitted) == 3, 60)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "failed: 3 x interrupted" in out and "ended early: interrupted; 0 requests were not sent" in out


# ---- servers that misbehave ------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWERS: Mapping[str, list[bytes | float | None]] = {
    "/whole": [HEAD, chunk(TOKEN + LAST + DONE), END],
    "/key": [HEAD, chunk(TOKEN + LAST + DONE), END],
    "/cut": [HEAD, chunk(TOKEN), None],
    "/stops": [HEAD, chunk(TOKEN), END],
    "/empty": [HEAD, chunk(DONE), END],
    "/junk": [HEAD, chunk(b"data: {oops\n\n"), END],
    "/no-http": [b"HELLO\r\n\r\n"],
    "/silent": [HEAD, chunk(TOKEN), 3.0],
    "/closes": [HEAD, chunk(TOKEN + LAST + DONE), END, None],
    "/error": [b"HTTP/1.1 503 Busy\r\nContent-Length: 11\r\n\r\nfull, sorry"],
    "/v1/models": [b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"data":[{"id":"bad"}]}'],
}


class Misbehaving(socketserver.StreamRequestHandler):
    """Answers by path; None closes the connection, a number waits that many seconds."""

    def handle(self) -> None:
        while True:
            path, n_body, may_enter = "", 0, False
            while (line := self.rfile.readline().decode().strip()) != "":
                path = path or line.split()[1]
                may_enter = may_enter or line == "Authorization: Bearer sesame"
                if line.lower().startswith("content-length:"):
                    n_body = int(line.split(":")[1])
            if not path:
                return
            if path == "/key" and not may_enter:
                path = "/error"
            self.rfile.read(n_body)
            for step in ANSWERS[path]:
                if step is None:
                    return
                if isinstance(step, float):
                    time.sleep(step)
                else:
                    self.wfile.write(step)
                    self.wfile.flush()


class Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what the tests want."""


@contextmanager
def misbehaving() -> Iterator[str]:
    with Listener(("127.0.0.1", 0), Misbehaving) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        listener.shutdown()
        thread.join(30)


@pytest.fixture(scope="module")
def bad_url() -> Iterator[str]:
    with misbehaving() as url:
        yield url


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("/cut", "disconnected", "closed the connection before the end"),
        ("/stops", "cut_short", "ended without"),
        ("/empty", "no_tokens", "no text"),
        ("/junk", "bad_event", "{oops"),
        ("/no-http", "bad_http", "not HTTP"),
        ("/silent", "timeout", "silent for 0.3 s"),
        ("/error", "http_503", "full, sorry"),
    ],
)
def test_failures_have_a_kind(path: str, kind: str, text: str, bad_url: str, bench: Bench) -> None:
    flags = ("--endpoint", path, "--timeout", "0.3", "--warmup", "0", "--model", "m")
    result = bench(bad_url, *lengths(3, 4, 2), *flags, status=1)
    assert list(result["errors"]) == [kind] and result["errors"][kind]["count"] == 3 == result["n_failed"]
    assert text in result["errors"][kind]["first"]


@pytest.mark.parametrize("path", ["/whole", "/closes"])
def test_connections_are_kept_and_a_closed_one_is_replaced(path: str, bad_url: str, bench: Bench) -> None:
    flags = ("--endpoint", path, "--concurrency", "1", "--model", "m")
    result = bench(bad_url, *lengths(20, 4, 2), *flags)
    assert result["n_answered"] == 20 and result["output_tokens"] == 40
    assert "the server sends no usage: output tokens are counted as events" in bench.notes[0]


def test_the_key_is_sent_and_not_written(bad_url: str, bench: Bench) -> None:
    flags = (*lengths(2, 4, 2), "--endpoint", "/key", "--model", "m", "--warmup", "0")
    assert bench(bad_url, *flags, "--api-key", "sesame")["n_answered"] == 2
    assert "sesame" not in bench.file.read_text() + bench.out
    assert bench(bad_url, *flags, status=1)["errors"]["http_503"]["count"] == 2


def test_a_second_run_with_the_same_prompts_is_told(server: Server, bench: Bench) -> None:
    flags = (*lengths(2, 40, 2), "--vocab-size", str(VOCAB_SIZE), "--workload-seed", "77")
    assert bench(server.url, *flags)["cached_tokens"] == 0
    assert bench(server.url, *flags)["cached_tokens"] == 64
    assert any("80% of the input was in the prefix cache" in note for note in bench.notes)
