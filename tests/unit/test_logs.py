"""Log files shared by processes, and the console's start-up and status lines."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy.config.schema import (
    CacheConfig,
    EngineConfig,
    LogprobsConfig,
    ModelConfig,
    ModelShape,
    ParallelConfig,
    RopeShape,
    SchedulerConfig,
)
from fastdeploy.errors import ConfigError
from fastdeploy.observability.logs import CONSOLE, DailyFileHandler, RequestLogger, close_logging, setup_logging
from fastdeploy.observability.startup import StartupReport, Throughput, human_bytes
from fastdeploy.wire.messages import LoadProgress, Ready, Status

pytestmark = pytest.mark.timeout(120)

DAY_S = 86400.0
NOON_S = 1_750_000_000.0  # 2025-06-15, far from midnight in UTC
CONFIG = EngineConfig(
    model=ModelConfig(
        path="/m",
        served_name="tiny",
        shape=ModelShape(
            architecture="LlamaForCausalLM",
            family="llama",
            hidden_size=8,
            n_layers=1,
            n_heads=1,
            n_kv_heads=1,
            head_dim=8,
            ffn_width=8,
            vocab_size=8,
            max_positions=128,
            norm_eps=1e-5,
            tied_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            qk_norm=False,
            rope=RopeShape(theta=1e4, style="half_split"),
        ),
        dtype="float32",
        device="cpu",
        max_model_len=128,
        eos_token_ids=(),
        sampling_defaults={},
    ),
    cache=CacheConfig(),
    scheduler=SchedulerConfig(),
    parallel=ParallelConfig(),
    logprobs=LogprobsConfig(),
    log_dir="log",
)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    close_logging()


def record(text: str, created_s: float) -> logging.LogRecord:
    made = logging.LogRecord("fastdeploy", logging.INFO, __file__, 1, text, (), None)
    made.created = created_s
    return made


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# ---- files -------------------------------------------------------------------------------------------------------


def test_files_of_a_front_end(tmp_path: Path) -> None:
    console = io.StringIO()
    setup_logging(str(tmp_path / "a" / "log"), "api_server", stream=console, environ={})
    logging.getLogger("fastdeploy.some.module").info("text %d", 1)
    logging.getLogger("fastdeploy.some.module").debug("not shown")
    logging.getLogger(CONSOLE).info("started")
    folder = tmp_path / "a" / "log"
    for name in ("fastdeploy.log", "api_server.log"):
        first, second = lines(folder / name)
        assert f"INFO [api_server {os.getpid()}] fastdeploy.some.module: text 1" in first
        assert second.endswith("started")
    assert [line.split(": ")[-1] for line in lines(folder / "console.log")] == ["started"]
    assert [line.split(" ", 1)[1] for line in console.getvalue().splitlines()] == ["started"]


def test_files_of_a_rank(tmp_path: Path) -> None:
    setup_logging(str(tmp_path), "rank3", console=False, environ={"FD_DEBUG": "1"})
    logging.getLogger("fastdeploy.runner").debug("fine detail")
    for name in ("fastdeploy.log", "workerlog.3"):
        (line,) = lines(tmp_path / name)
        assert "DEBUG [rank3 " in line
        assert line.endswith("fine detail")
    assert not (tmp_path / "api_server.log").exists()


def test_request_id_is_in_the_record(tmp_path: Path) -> None:
    console = io.StringIO()
    setup_logging(str(tmp_path), "core0", stream=console, environ={})
    RequestLogger(logging.getLogger("fastdeploy.engine"), "chatcmpl-7").warning("too %s", "long")
    assert lines(tmp_path / "fastdeploy.log")[0].endswith("fastdeploy.engine: (chatcmpl-7) too long")
    assert console.getvalue().rstrip().endswith("core0: warning: (chatcmpl-7) too long")


def test_setting_up_again_does_not_double_lines(tmp_path: Path) -> None:
    for _ in range(2):
        setup_logging(str(tmp_path), "api_server", console=False, environ={})
    logging.getLogger("fastdeploy").info("once")
    assert len(lines(tmp_path / "fastdeploy.log")) == 1


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="FD_LOG_DIR"):
        setup_logging(str(tmp_path / "file" / "log"), "api_server", environ={})


def test_bad_number_of_days(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FD_LOG_BACKUP_COUNT=x"):
        setup_logging(str(tmp_path), "api_server", environ={"FD_LOG_BACKUP_COUNT": "x"})


def test_a_new_day_is_a_new_file_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOON_S)
    (tmp_path / "x.log.notes").write_text("not ours")
    handler = DailyFileHandler(tmp_path, "x.log", days_kept=2)
    other = DailyFileHandler(tmp_path, "x.log", days_kept=2)  # as another process would have it open
    for day in range(5):
        handler.emit(record(f"day {day}", NOON_S + day * DAY_S))
        other.emit(record(f"other {day}", NOON_S + day * DAY_S))
    handler.emit(record("late record of the day before", NOON_S + 3 * DAY_S))
    handler.close()
    other.close()
    dated = sorted(path for path in tmp_path.iterdir() if path.name.startswith("x.log.2"))
    assert [lines(path) for path in dated] == [
        ["day 2", "other 2"],
        ["day 3", "other 3"],
        ["day 4", "other 4", "late record of the day before"],
    ]
    assert (tmp_path / "x.log").resolve() == dated[-1].resolve()
    assert (tmp_path / "x.log.notes").exists()
    assert not list(tmp_path.glob(".x.log*"))


def test_a_plain_file_under_the_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("from another program")
    DailyFileHandler(tmp_path, "x.log").close()
    (kept,) = tmp_path.glob("x.log.found-*")
    assert kept.read_text() == "from another program"
    assert (tmp_path / "x.log").is_symlink()


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    code = f"""
import logging, sys
from fastdeploy.observability.logs import setup_logging
setup_logging({str(tmp_path)!r}, "rank" + sys.argv[1], console=False, environ={{}})
for i in range(200):
    logging.getLogger("fastdeploy").info("%s", sys.argv[1] * 300)
"""
    children = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    texts = [line.rpartition(" ")[2] for line in lines(tmp_path / "fastdeploy.log")]
    assert sorted(texts) == sorted(str(n) * 300 for n in range(3) for _ in range(200))
    assert len(lines(tmp_path / "workerlog.1")) == 200


def test_a_full_disk_drops_lines_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = DailyFileHandler(tmp_path, "x.log")

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for _ in range(3):
            handler.emit(record("lost", time.time()))
    handler.emit(record("kept", time.time()))
    handler.close()
    assert lines(tmp_path / "x.log") == ["(3 log lines lost: they could not be written)", "kept"]
    assert capsys.readouterr().err.count("No space left") == 1


# ---- start-up ----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


READY = Ready(n_pages=512, kv_bytes=2**27, weight_bytes=3 * 2**20, stages_s={"weights": 3.2, "pages": 0.1})


def test_start_up_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    clock, stream = Clock(), io.StringIO()
    report = StartupReport(stream, clock=clock)
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        with report.stage("tokenizer"):
            clock.now_s = 0.5
        for done in range(11):
            clock.now_s += 0.3
            report.on_progress(LoadProgress("weights", done, 10, "B"))
        clock.now_s = 4.0
        report.on_progress(LoadProgress("pages", 0, 0, ""))
        clock.now_s = 5.0
        report.on_ready(CONFIG, READY, "http://0.0.0.0:8000")
    shown = [entry.getMessage() for entry in caplog.records if entry.name == CONSOLE]
    assert shown == [
        "tokenizer: 0.5 s",
        "weights: 3.2 s",
        "pages: 1.0 s",
        "started in 5.0 s: tokenizer 0.5 s, weights 3.2 s, pages 0.1 s",
        "model tiny: LlamaForCausalLM, float32 on cpu, weights 3.0 MiB, up to 128 tokens a request",
        "cache 128.0 MiB: 512 pages of 64 tokens = 32768 tokens, up to 8 requests at once",
        "ready at http://0.0.0.0:8000",
    ]
    assert "Reset block num, the total_block_num:512, prefill_kvcache_block_num:512" in caplog.text
    assert stream.getvalue() == ""  # no bars where nobody looks


def test_start_up_on_a_terminal_draws_bars() -> None:
    stream = io.StringIO()
    report = StartupReport(stream, interactive=True)
    for done in (0, 50, 100):
        report.on_progress(LoadProgress("weights", done, 100, "B"))
    report.on_progress(LoadProgress("pages", 0, 0, ""))
    report.close()
    assert "weights" in stream.getvalue()
    assert "pages" in stream.getvalue()


def test_human_bytes() -> None:
    sizes = (0, 1023, 1536, 2**20, 3 * 2**30, 2**41)
    assert [human_bytes(n) for n in sizes] == ["0 B", "1023 B", "1.5 KiB", "1.0 MiB", "3.0 GiB", "2.0 TiB"]


# ---- status line -------------------------------------------------------------------------------------------------


def status(n_steps: int, n_running: int = 1, n_generated: int = 0, n_prompt: int = 0, n_cached: int = 0) -> Status:
    return Status(
        n_running=n_running,
        n_waiting=0,
        n_preempted_total=0,
        n_pages_free=50,
        n_pages_cached=25,
        n_pages_total=100,
        n_prompt_tokens_total=n_prompt,
        n_cached_tokens_total=n_cached,
        n_generated_tokens_total=n_generated,
        n_steps_total=n_steps,
        n_running_tokens=0,
        n_waiting_tokens=0,
        stalled_s=0.0,
    )


def test_a_line_every_interval_while_busy() -> None:
    throughput = Throughput(interval_s=5.0)
    shown = [throughput.update(status(second, 2, second * 100, 1000, 500), float(second)) for second in range(11)]
    assert [second for second, line in enumerate(shown) if line] == [5, 10]
    assert shown[10] == ("running 2, waiting 0 | KV cache 25% used | prompt 0 tokens/s | generation 100 tokens/s")


def test_prompt_rate_and_prefix_hits_are_of_the_window() -> None:
    throughput = Throughput(interval_s=2.0)
    assert throughput.update(status(1, n_prompt=1000, n_cached=0), 0.0) is None
    line = throughput.update(status(2, n_prompt=1400, n_cached=100), 2.0)
    assert line is not None
    assert "prompt 200 tokens/s" in line
    assert line.endswith("prefix hits 25%")


def test_idle_time_does_not_count() -> None:
    throughput = Throughput(interval_s=5.0)
    for second in range(100):
        assert throughput.update(status(1, n_running=0), float(second)) is None
    throughput.update(status(1, n_running=1), 99.5)
    assert throughput.update(status(5, n_running=1, n_generated=10), 103.0) is None
    line = throughput.update(status(9, n_running=0, n_generated=50), 104.0)  # the work ended before the interval did
    assert line is not None
    assert "generation 10 tokens/s" in line  # 50 tokens in the 5 s since it was last idle
    assert throughput.update(status(9, n_running=0, n_generated=50), 105.0) is None


def test_short_bursts_do_not_flood() -> None:
    throughput = Throughput(interval_s=5.0)
    shown = []
    for second in range(20):
        shown.append(throughput.update(status(second * 2 + 1, n_running=1), second + 0.2))
        shown.append(throughput.update(status(second * 2 + 2, n_running=0), second + 0.8))
    assert len([line for line in shown if line]) == 4


def test_a_restarted_core_starts_a_new_window() -> None:
    throughput = Throughput(interval_s=5.0)
    throughput.update(status(1000, n_generated=9000), 0.0)
    assert throughput.update(status(1, n_generated=0), 6.0) is None
    line = throughput.update(status(2, n_generated=50), 11.0)
    assert line is not None
    assert "generation 10 tokens/s" in line


def test_what_went_wrong_is_in_the_line() -> None:
    from msgspec.structs import replace

    throughput = Throughput(interval_s=1.0)
    throughput.update(status(1), 0.0)
    line = throughput.update(replace(status(2), n_preempted_total=3, stalled_s=12.0), 2.0)
    assert line is not None
    assert line.endswith("3 preempted | no progress for 12 s")
