"""Workloads and traces: the same requests every time, lengths and shared prefixes as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy.bench.arrivals import arrival_times_s
from fastdeploy.bench.flags import RequestArgs
from fastdeploy.bench.traces import read_trace
from fastdeploy.bench.workloads import (
    BUILT_IN,
    Workload,
    fitting,
    folded,
    limits_of,
    vocabulary_notes,
    workloads_of,
)
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,48,10
2023-11-16 18:17:04.0799600,31,8
2023-11-16 18:17:33.9799600,11,0
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]},
    {"timestamp": 1500, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 7]},
    {"timestamp": 4000, "input_length": 300, "output_length": 5, "hash_ids": [9]},
]


def one(**flags: Any) -> Workload:
    (workload,) = workloads_of(RequestArgs(**flags))
    return workload


def prompts(workload: Workload) -> list[list[int]]:
    return [request.make_ids().tolist() for request in workload.requests]


@pytest.fixture
def azure(tmp_path: Path) -> str:
    (tmp_path / "a.csv").write_text(AZURE)
    return str(tmp_path / "a.csv")


@pytest.fixture
def mooncake(tmp_path: Path) -> str:
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return str(tmp_path / "m.jsonl")


# ---- by name, by file, by lengths ------------------------------------------------------------------------------------


def test_named_workloads_have_their_sizes_and_their_prompts() -> None:
    sizes = {name: (w.n_requests, w.n_input, w.n_output) for name, w in BUILT_IN.items()}
    assert sizes == {
        "single": (1, 128, 256),
        "decode64": (64, 128, 512),
        "decode256": (256, 128, 512),
        "mixed": (1024, 1024, 256),
        "prefill": (128, 4096, 1),
    }
    rng = np.random.default_rng(20261121)
    expected = [rng.integers(10, 100000, size=128).tolist() for _ in range(64)]
    assert expected[0][:5] == [36634, 63710, 81204, 96587, 98482]
    decode64, single = workloads_of(RequestArgs(workload=("decode64", "single")))
    assert prompts(decode64) == expected == prompts(decode64)
    assert prompts(single) == expected[:1]
    assert (decode64.n_input_tokens, decode64.n_output_tokens) == (64 * 128, 64 * 512)
    assert not decode64.timed


def test_lengths_and_seed() -> None:
    workload = one(requests=3, input_len=7, output_len=2, workload_seed=5)
    rng = np.random.default_rng(5)
    assert prompts(workload) == [rng.integers(10, 100000, size=7).tolist() for _ in range(3)]
    assert prompts(one(requests=3, input_len=7)) != prompts(workload)
    assert len(one().requests) == 64 and len(one(max_requests=2).requests) == 2


def test_a_file_of_workloads(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    entries = {
        "a": {"requests": 2, "input_len": 5, "output_len": 3, "what": "small"},
        "b": {"requests": 1, "input_len": 2, "output_len": 1},
    }
    path.write_text(json.dumps({"seed": 11, "workloads": entries, "limits": {"max_num_seqs": 4, "other": 1}}))
    args = RequestArgs(workloads=str(path))
    a, b = workloads_of(args)
    assert (a.name, b.name, a.seed) == ("a", "b", 11)
    assert prompts(a)[0] == np.random.default_rng(11).integers(10, 100000, size=5).tolist()
    assert limits_of(args) == {"max_num_seqs": 4, "max_num_batched_tokens": 8192, "max_model_len": 8192}
    assert one(workloads=str(path), workload=("b",)).name == "b"
    with pytest.raises(ConfigError, match=r"--workload bb: no such workload in .*w.json; did you mean b\?"):
        one(workloads=str(path), workload=("bb",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'expected {"workloads"'),
        ('{"workloads": {"a": {"requests": 1, "input_len": 0, "output_len": 1}}}', "a needs the positive integers"),
        ('{"workloads": {"a": 3}}', "a needs the positive integers"),
        ('{"seed": "x", "workloads": {"a": {"requests": 1, "input_len": 1, "output_len": 1}}}', "seed must be"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--workloads {path}: {message}"):
        workloads_of(RequestArgs(workloads=str(path)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workload": ("single",), "requests": 2}, "--workload or --workloads and --requests, .*: give only one"),
        ({"trace": "x", "workload": ("single",)}, "--trace and --workload .*: give only one"),
        ({"workload": ("sinle",)}, "no such workload; did you mean single"),
        ({"requests": 0}, "--requests 0: must be above 0"),
        ({"length_scale": 0.5}, "--length-scale is for a --trace"),
        ({"workloads": "/nowhere/w.json"}, "--workloads /nowhere/w.json: No such file"),
        ({"workload_seed": -1}, "--workload-seed -1: must be at least 0"),
        ({"input_len": 100, "output_len": 10, "max_total_len": 109}, "none of its 64 requests fits into 109 tokens"),
    ],
)
def test_contradictions(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workloads_of(RequestArgs(**flags))


def test_ids_are_folded_into_a_small_vocabulary() -> None:
    ids = np.array([10, 99, 100, 101, 189, 190, 99999])
    assert folded(ids, 100) == [10, 99, 10, 11, 99, 10, 10 + (99999 - 10) % 90]
    assert folded(ids, None) == folded(ids, 100_000) == ids.tolist()
    assert vocabulary_notes(100_000) == vocabulary_notes(None) == ()
    assert vocabulary_notes(100) == ("the vocabulary has 100 tokens: prompt ids are folded into 10..99",)
    with pytest.raises(ConfigError, match="too small"):
        vocabulary_notes(10)


# ---- traces ----------------------------------------------------------------------------------------------------------


def test_azure_trace(azure: str) -> None:
    workload = one(trace=azure)
    assert workload.timed and workload.name == "a"
    assert [round(r.arrival_s, 6) for r in workload.requests] == [0.0, 0.1, 30.0]
    assert [(r.n_input, r.n_output) for r in workload.requests] == [(48, 10), (31, 8), (11, 1)]
    assert [len(ids) for ids in prompts(workload)] == [48, 31, 11]
    assert prompts(workload) == prompts(one(trace=azure))
    assert prompts(workload)[0][:11] != prompts(workload)[2]
    assert all(10 <= i < 100_000 for ids in prompts(workload) for i in ids)


def test_mooncake_trace_shares_what_the_recorded_requests_shared(mooncake: str) -> None:
    workload = one(trace=mooncake)
    a, b, c = prompts(workload)
    assert [len(a), len(b), len(c)] == [1100, 1030, 300]
    assert a[:1024] == b[:1024] and a[1024:1030] != b[1024:]
    assert a[:300] != c and a[512:1024] != a[:512]
    assert [r.arrival_s for r in workload.requests] == [0.0, 0.5, 3.0]
    assert prompts(one(trace=mooncake, workload_seed=1))[0] != a


def test_a_scaled_trace_still_shares(mooncake: str) -> None:
    workload = one(trace=mooncake, length_scale=0.1, time_scale=2.0)
    a, b, _ = prompts(workload)
    assert [r.arrival_s for r in workload.requests] == [0.0, 1.0, 6.0]
    assert [(r.n_input, r.n_output) for r in workload.requests] == [(110, 5), (103, 1), (30, 1)]
    block = 52  # of 512 tokens, scaled and rounded up
    assert a[: 2 * block - 1] == b[: 2 * block - 1] and len(b) == 103
    assert workload.describe()["length_scale"] == 0.1


def test_long_requests_are_left_out_and_counted(mooncake: str) -> None:
    workload = one(trace=mooncake, max_total_len=1040)
    assert [r.n_input for r in workload.requests] == [1030, 300]
    assert workload.notes == ("1 of 3 requests are left out: longer than 1040 tokens",)
    assert [r.n_input for r in one(trace=mooncake, max_total_len=1040, max_requests=1).requests] == [1030]
    assert fitting(workload, None) is workload


def test_rows_are_sorted_by_time(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in reversed(MOONCAKE)))
    rows, kind = read_trace(path)
    assert kind == "mooncake" and [row.n_input for row in rows] == [1100, 1030, 300]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither Mooncake's JSONL nor Azure's CSV"),
        ("a,b,c\n1,2,3\n", "neither Mooncake's JSONL nor Azure's CSV"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "it has no requests"),
        (AZURE + "2023-11-16 18:17:34,x,3\n", "line 5: invalid literal"),
        (AZURE + "2023-11-16 18:17:34,3\n", "line 5: expected 3 columns, got 2"),
        (AZURE + "2023-11-16 18:17:34,0,3\n", "line 5: lengths or time out of range"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n', "line 1: no 'hash_ids'"),
        (
            '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}\n',
            "line 1: 1 hash_ids hold 512 of 513",
        ),
        ('{"timestamp": 0,\n', "line 1: Expecting"),
    ],
)
def test_a_wrong_trace_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--trace {path}.*{message}"):
        one(trace=str(path))


# ---- arrival times ---------------------------------------------------------------------------------------------------


def test_arrival_times_have_the_rate_and_the_burstiness() -> None:
    times = np.array(arrival_times_s(20_001, 50.0, 1.0, seed=3))
    gaps = np.diff(times)
    assert times[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.05)  # exponential
    bursty = np.diff(arrival_times_s(20_001, 50.0, 0.25, seed=3))
    assert bursty.mean() == pytest.approx(1 / 50, rel=0.06)
    assert bursty.std() / bursty.mean() == pytest.approx(2.0, rel=0.1)
    assert times.tolist() == arrival_times_s(20_001, 50.0, 1.0, seed=3)
    assert arrival_times_s(1, 50.0, 1.0, seed=3) == [0.0]
