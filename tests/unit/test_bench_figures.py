"""Percentiles, goodput, rates, tables and the result file, by hand; the reader of event streams."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.bench.distribution import Timing, n_within, parse_limits, rate_over_time, summaries_ms, summary_ms
from fastdeploy.bench.flags import ResultArgs
from fastdeploy.bench.load import Answer, LoadRun
from fastdeploy.bench.report import Report, check_result_args, latency_table, number, shown_command, table
from fastdeploy.bench.serve_figures import figures, notes, raw, shown
from fastdeploy.bench.sse import EventReader, chunk_decoder
from fastdeploy.bench.workloads import Lengths, Request, Workload, make_workload
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

WORKLOAD = make_workload("tiny", Lengths(4, 8, 3), 1)


def request() -> Request:
    return WORKLOAD.requests[0]


def answer(index: int, start_s: float, events_s: list[float], n_output: int, error: str | None = None) -> Answer:
    return Answer(
        index,
        request(),
        start_s,
        end_s=(events_s or [start_s])[-1],
        events_s=array("d", events_s),
        n_input=8,
        n_output=n_output,
        error=error,
        error_text="" if error is None else f"{error} happened",
    )


# ---- many durations --------------------------------------------------------------------------------------------------


def test_percentiles_by_hand() -> None:
    summary = summary_ms([0.001 * i for i in range(101)])  # 0, 1, ... 100 ms
    assert summary == pytest.approx(
        {"n": 101, "mean": 50, "min": 0, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    )
    between = summary_ms([0.010, 0.020])
    assert between is not None and between["p50"] == pytest.approx(15) and between["p99"] == pytest.approx(19.9)
    assert summary_ms([]) is None


def test_durations_of_answers_with_one_token_have_no_tpot() -> None:
    found = summaries_ms([Timing(0.1, None, 0.1), Timing(0.3, 0.02, 0.5)])
    ttft, tpot = found["ttft_ms"], found["tpot_ms"]
    assert ttft is not None and ttft["mean"] == pytest.approx(200) and ttft["n"] == 2
    assert tpot is not None and tpot["mean"] == pytest.approx(20) and tpot["n"] == 1
    assert summaries_ms([Timing(0.1, None, 0.1)])["tpot_ms"] is None


def test_timing_of_an_answer() -> None:
    found = answer(0, 10.0, [10.5, 10.6, 11.1], 3).timing
    assert (found.ttft_s, found.tpot_s, found.e2e_s) == pytest.approx((0.5, 0.3, 1.1))
    # Two tokens in one event: the server's count decides.
    assert answer(0, 10.0, [10.5, 11.1], 4).timing.tpot_s == pytest.approx(0.2)
    assert answer(0, 10.0, [10.5], 1).timing.tpot_s is None


def test_goodput() -> None:
    limits = parse_limits(["ttft:500", "tpot:50"])
    assert limits == pytest.approx({"ttft": 0.5, "tpot": 0.05})
    timings = [Timing(0.5, 0.05, 9.0), Timing(0.51, 0.01, 1.0), Timing(0.1, 0.051, 1.0), Timing(0.1, None, 0.1)]
    assert n_within(timings, limits) == 2
    assert n_within(timings, {}) == 4
    assert n_within(timings, parse_limits(["e2e:1000"])) == 3


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:x", "ttft:0", "itl:5", ":5", "ttft:-1", "ttft:nan"])
def test_wrong_limits(word: str) -> None:
    with pytest.raises(ConfigError, match=f"--goodput {word}: expected NAME:MS"):
        parse_limits([word])


def test_rate_over_time_counts_every_token() -> None:
    rate = rate_over_time([0.0, 0.4, 1.0, 29.9, 30.0], [1, 2, 3, 4, 5], 30.0)
    assert rate.bucket_s == 1.0 and len(rate.tokens_per_s) == 30
    assert rate.tokens_per_s[0] == 3 and rate.tokens_per_s[1] == 3 and rate.tokens_per_s[29] == 9
    for duration_s in (0.01, 1.0, 19.9, 1000.0, 100_000.0):
        rate = rate_over_time([0.0, duration_s / 2, duration_s], [1, 1, 2], duration_s)
        assert len(rate.tokens_per_s) <= 300
        assert sum(rate.tokens_per_s) * rate.bucket_s == pytest.approx(4, rel=1e-2)


# ---- figures of a run ------------------------------------------------------------------------------------------------


def a_run() -> LoadRun:
    answers = [
        answer(0, 100.0, [100.5, 100.6, 100.7], 3),
        answer(1, 100.0, [101.0, 101.2, 102.0], 3),
        answer(2, 101.0, [], 0, "http_429"),
    ]
    return LoadRun(answers, start_s=100.0, end_s=104.0, cpu_s=0.4, peak_concurrency=2, stopped="the server is gone")


def test_figures_of_a_run() -> None:
    found = figures(WORKLOAD, {"mode": "closed loop", "concurrency": 2}, a_run(), {"ttft": 0.6})
    assert (found["n_sent"], found["n_answered"], found["n_failed"], found["n_not_sent"]) == (3, 2, 1, 1)
    assert found["errors"] == {"http_429": {"count": 1, "first": "http_429 happened"}}
    assert found["output_tokens_per_s"] == pytest.approx(6 / 4)
    assert found["input_tokens_per_s"] == pytest.approx(16 / 4)
    assert found["total_tokens_per_s"] == pytest.approx(22 / 4)
    assert found["requests_per_s"] == pytest.approx(2 / 4)
    assert found["goodput_requests_per_s"] == pytest.approx(1 / 4)
    assert found["goodput_share"] == pytest.approx(1 / 3)
    assert found["ttft_ms"]["p50"] == pytest.approx(750)
    assert found["tpot_ms"]["mean"] == pytest.approx((100 + 500) / 2)
    assert found["itl_ms"]["max"] == pytest.approx(800) and found["itl_ms"]["n"] == 4
    assert found["e2e_ms"]["max"] == pytest.approx(2000)
    assert found["client_core_share"] == pytest.approx(0.1)
    assert sum(found["output_tokens_over_time"]["tokens_per_s"]) * 0.2 == pytest.approx(6)
    assert list(notes(a_run(), WORKLOAD, True)) == []
    text = shown(found)
    assert "3 / 2 / 1" in text and "failed: 1 x http_429: http_429 happened" in text
    assert "ended early: the server is gone; 1 requests were not sent" in text


def test_a_run_without_answers_has_figures_too() -> None:
    found = figures(WORKLOAD, {"mode": "open loop", "arrivals": "as in the trace"}, LoadRun(end_s=1.0), {})
    assert found["ttft_ms"] is None and found["itl_ms"] is None and found["goodput_share"] is None
    assert "there are no latencies" in shown(found)
    json.dumps(found)


def test_notes_tell_what_makes_figures_doubtful() -> None:
    run = a_run()
    run.cpu_s, run.late_s = 3.9, [0.2] * 10
    run.answers[0].n_output, run.answers[1].counted_by_server = 4, False
    text = "\n".join(notes(run, WORKLOAD, True))
    assert "took 98% of a core" in text and "left late, by 200 ms" in text
    assert "sends no usage" in text and "1 answers have another length" in text and "fewer events than tokens" in text


def test_raw_request() -> None:
    whole, failed = raw(a_run().answers[0], a_run()), raw(a_run().answers[2], a_run())
    assert whole["ttft_ms"] == pytest.approx(500) and whole["itl_ms"] == pytest.approx([100, 100])
    assert failed["error"] == "http_429" and failed["ttft_ms"] is None and failed["start_s"] == 1.0


# ---- tables and files ------------------------------------------------------------------------------------------------


def test_table_is_aligned() -> None:
    lines = table([("name", "a", "long header"), ("x", "1,000", "2")]).splitlines()
    assert lines == ["name      a  long header", "------------------------", "x     1,000            2"]
    assert [number(v) for v in (0.1234, 12.345, 123.45, 12345.6)] == ["0.12", "12.35", "123.5", "12,346"]
    shown_lines = latency_table({"ttft_ms": summary_ms([0.001, 0.003]), "itl_ms": None}).splitlines()
    assert len(shown_lines) == 3 and shown_lines[2].split()[-6:] == ["2.00", "2.00", "2.80", "2.90", "2.98", "3.00"]


def test_the_file_has_what_is_needed_to_measure_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("serve", ["serve", "--workload", "single"], config={"model": "m"})
    report.results.append(figures(WORKLOAD, {"mode": "closed loop", "concurrency": 2}, a_run(), {}))
    report.note("one", "two")
    report.note("one")
    report.finish("the table", ResultArgs(output=str(tmp_path / "r.json")))
    assert capsys.readouterr().out.splitlines()[:3] == ["the table", "note: one", "note: two"]
    content: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert content["command"] == "fastdeploy bench serve --workload single"
    assert content["benchmark"] == "serve" and content["notes"] == ["one", "two"]
    assert {"cpu", "cores", "gpus", "memory_gib"} <= content["hardware"].keys()
    assert {"python", "numpy", "fastdeploy"} <= content["versions"].keys()
    assert content["results"][0]["name"] == "tiny" and content["date"].startswith("20")


def test_the_command_shows_neither_keys_nor_folders() -> None:
    argv = ["serve", "--api-key", "sesame", "--api_key=sesame", "--trace=/home/me/data/t.csv", "--model", "/a/b/c/d"]
    assert shown_command(argv) == (
        "fastdeploy bench serve --api-key (hidden) --api_key=(hidden) --trace=.../t.csv --model .../d"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (ResultArgs(output="/nowhere/x.json"), "--output /nowhere/x.json: there is no folder /nowhere"),
        (ResultArgs(raw=True), "--raw: it adds to the file"),
        (ResultArgs(plot="x.txt"), "the name must end in .png, .svg, .pdf"),
    ],
)
def test_results_that_could_not_be_written_are_noticed_at_once(args: ResultArgs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_result_args(args)


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fastdeploy.bench.plot as plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib, which is not installed: pip install"):
        check_result_args(ResultArgs(plot=str(tmp_path / "x.svg")))


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report("serve", ["serve"], config={"model": "m"})
    empty = figures(WORKLOAD, {"mode": "closed loop", "concurrency": 2}, LoadRun(end_s=1.0), {})
    report.results += [figures(WORKLOAD, {"mode": "closed loop", "concurrency": 2}, a_run(), {}), empty]
    report.finish("", ResultArgs(plot=str(tmp_path / "x.svg")))
    text = (tmp_path / "x.svg").read_text()
    assert text.count("<svg") == 1 and len(text) > 10_000


# ---- event streams ---------------------------------------------------------------------------------------------------


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_event(text: str, finish: str | None = None) -> bytes:
    return event(id="x", choices=[{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}])


def chat_event(**delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": None}])


USAGE = event(
    choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
)
STREAM = text_event("a") + text_event("") + text_event("b\n\nc", "length") + USAGE + b"data: [DONE]\n\n"


def read(stream: bytes, n_bytes: int = 10_000_000) -> EventReader:
    """`n_bytes` at a time, each piece a second later."""
    reader = EventReader(chunk_decoder())
    for i, at in enumerate(range(0, len(stream), n_bytes)):
        reader.feed(stream[at : at + n_bytes], float(i))
    return reader


@pytest.mark.parametrize("n_bytes", [1, 7, 64, 10_000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_stream_in_pieces(n_bytes: int, line_end: bytes) -> None:
    reader = read(STREAM.replace(b"\n", line_end), n_bytes)
    assert reader.done and reader.problem is None and reader.finish_reason == "length"
    assert len(reader.events_s) == 3  # the one without text is a token whose text is held back
    assert list(reader.events_s) == sorted(reader.events_s)
    assert (reader.n_input, reader.n_output, reader.n_cached_tokens) == (7, 3, 4)


def test_chat_streams_count_content_and_reasoning_only() -> None:
    stream = chat_event(role="assistant", content="") + chat_event(reasoning_content="hm") + chat_event(content="yes")
    reader = read(stream + b": a comment\n\n" + b'event: x\ndata: {"choices":\ndata: []}\n\n')
    assert len(reader.events_s) == 2 and reader.problem is None and not reader.done


def test_errors_in_a_stream() -> None:
    failed = read(text_event("a") + event(error={"message": "out of memory", "code": 500}) + b"data: [DONE]\n\n")
    assert failed.problem == ("error_event", "out of memory") and failed.done
    broken = read(b"data: {oops\n\n")
    assert broken.problem is not None and broken.problem[0] == "bad_event" and "{oops" in broken.problem[1]


def test_workloads_are_what_figures_are_named_after() -> None:
    workload = Workload("w", WORKLOAD.requests[:1], 3, {"trace": "t.csv"})
    assert workload.describe() == {
        "name": "w",
        "requests": 1,
        "input_tokens": 8,
        "output_tokens": 3,
        "seed": 3,
        "trace": "t.csv",
    }
