"""`bench throughput` and `bench latency` on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.entrypoints import cli

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.fixture
def run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """`run("throughput", flags...)` is the content of the result file, and what was printed."""
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "log"))

    def measured(name: str, *flags: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / "result.json"
        engine = ("--model", str(model), "--device", "cpu", "--block-size", "16", "--no-progress")
        assert cli.main(["bench", name, *engine, "--output", str(file), *flags]) == 0
        return json.loads(file.read_text()), capsys.readouterr().out

    return measured


def test_throughput_of_a_file_of_workloads(run: Callable[..., tuple[dict[str, Any], str]], tmp_path: Path) -> None:
    workloads = {
        "few": {"requests": 3, "input_len": 20, "output_len": 5},
        "many": {"requests": 12, "input_len": 40, "output_len": 2},
    }
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"seed": 1, "workloads": workloads, "limits": {"max_num_seqs": 4}}))
    content, out = run("throughput", "--workloads", str(file), "--repeat", "3", "--raw")
    few, many = content["results"]
    assert (few["name"], few["input_tokens"], few["output_tokens"], few["n_failed"]) == ("few", 60, 15, 0)
    assert (many["name"], many["input_tokens"], many["output_tokens"], many["n_failed"]) == ("many", 480, 24, 0)
    for result in (few, many):
        assert len(result["runs"]) == 3
        assert {name: result[name] for name in result["runs"][-1]} == result["runs"][-1]
        assert all(run["cached_tokens"] == 0 for run in result["runs"])  # though the prompts are the same ones
        assert result["output_tokens_per_s"] == pytest.approx(result["output_tokens"] / result["seconds"])
        assert result["ttft_ms"]["min"] > 0 and result["e2e_ms"]["max"] <= result["seconds"] * 1000 + 5
        assert len(result["requests"]) == result["n_answered"]
    engine = content["config"]["engine"]
    assert engine["scheduler"]["max_seqs"] == 4 and not engine["cache"]["prefix_caching"]
    assert engine["model"]["max_model_len"] == 256  # what the model holds
    assert content["config"]["model"] == "model" and str(tmp_path) not in json.dumps(content)
    lines = out.splitlines()
    assert lines[2].split()[:2] == ["few", "3"] and lines[3].split()[:2] == ["many", "12"]
    assert "note: the vocabulary has 128 tokens: prompt ids are folded into 10..127" in lines


def test_throughput_of_a_trace_leaves_out_what_does_not_fit(
    run: Callable[..., tuple[dict[str, Any], str]], tmp_path: Path
) -> None:
    rows = [{"timestamp": 0, "input_length": n, "output_length": 4, "hash_ids": [1]} for n in (100, 500, 120)]
    trace = tmp_path / "m.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    content, out = run("throughput", "--trace", str(trace), "--enable-prefix-caching", "--max-num-seqs", "1")
    (result,) = content["results"]
    assert result["n_answered"] == 2 and result["input_tokens"] == 220
    assert result["runs"][0]["cached_tokens"] == 96  # of the second request, which begins like the first
    assert "note: 1 of 3 requests are left out: longer than 256 tokens" in out


def test_latency(run: Callable[..., tuple[dict[str, Any], str]]) -> None:
    flags = ("--batch-size", "1,3", "--input-len", "20", "--output-len", "4", "--iterations", "2", "--warmup", "1")
    content, out = run("latency", *flags, "--raw")
    one, three = content["results"]
    assert (one["batch_size"], three["batch_size"]) == (1, 3)
    assert (one["ttft_ms"]["n"], three["ttft_ms"]["n"]) == (2, 6)
    for result in (one, three):
        assert result["n_failed"] == 0 and len(result["batch_seconds"]) == 2
        first, last, each = result["ttft_ms"]["mean"], result["e2e_ms"]["mean"], result["tpot_ms"]["mean"]
        assert 0 < first < last and last - first == pytest.approx(3 * each)
        assert len(result["requests"]) == result["ttft_ms"]["n"]
    assert "batch 3: 2 times, 20 tokens in, 4 out" in out and out.count("time to first token (TTFT)") == 2
