"""The command line of `fastdeploy bench`: help without heavy imports, one-line errors, the engine's limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy.bench.flags import BenchEngineArgs
from fastdeploy.bench.offline import with_limits
from fastdeploy.bench.workloads import LIMITS
from fastdeploy.config.args import EngineArgs
from fastdeploy.config.flags import build_parser, flags_of
from fastdeploy.entrypoints import cli
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "starlette", "uvicorn", "matplotlib", "uvloop")


@pytest.mark.parametrize("argv", [[], ["throughput", "--help"], ["latency", "--help"], ["serve", "--help"]])
def test_help_without_heavy_imports(argv: list[str]) -> None:
    code = f"""
import sys
from fastdeploy.entrypoints.cli import main
try:
    status = main({["bench", *argv]!r})
except SystemExit as exc:
    status = exc.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules], status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[-1] == "loaded: [] 0"
    assert any(line.lower() == "examples:" for line in lines)
    assert any(line.startswith("  fastdeploy bench ") for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serv"], "no benchmark 'serv'; did you mean serve?"),
        (["serve", "--concurency", "3"], "--concurency: no such flag; did you mean --concurrency?"),
        (["serve", "--concurrency", "3", "--request-rate", "2"], "--concurrency and --request-rate: give only one"),
        (["serve", "--request-rate", "0"], "--request-rate 0.0: must be above 0"),
        (["serve", "--warmup", "-1"], "--warmup -1: must be at least 0"),
        (["serve", "--endpoint", "v1"], "--endpoint v1: expected a path"),
        (["serve", "--base-url", "ftp://x"], "--base-url ftp://x: expected http://HOST:PORT"),
        (["serve", "--base-url", "http://x:99999"], "--base-url http://x:99999: Port out of range"),
        (["serve", "--goodput", "x:1"], "--goodput x:1: expected NAME:MS"),
        (["throughput"], "--model DIR is needed"),
        (["throughput", "--repeat", "0"], "--repeat 0: must be at least 1"),
        (["latency", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["latency", "--iterations", "0"], "--iterations 0: must be at least 1"),
        (["latency", "--model", "/nowhere"], "--model /nowhere"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"fastdeploy: error: {message}")


def test_engine_flags_are_all_there_with_the_limits_of_benchmarks() -> None:
    assert [flag.name for flag in flags_of(BenchEngineArgs)] == [flag.name for flag in flags_of(EngineArgs)]
    parse = build_parser("x", BenchEngineArgs).parse_flags
    args = BenchEngineArgs.from_namespace(parse(["--model", "m", "--block-size", "16"]))
    assert (args.max_num_seqs, args.enable_prefix_caching, args.block_size) == (256, False, 16)
    assert BenchEngineArgs.from_namespace(parse(["--enable-prefix-caching"])).enable_prefix_caching


def test_lengths_left_open_are_those_of_the_workloads_or_what_the_model_holds(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 500,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def lengths(**flags: int) -> tuple[int | None, int | None]:
        args = with_limits(BenchEngineArgs(model=str(tmp_path), **flags), LIMITS)
        return args.max_model_len, args.max_num_batched_tokens

    assert lengths() == (500, 8192)
    assert lengths(max_num_seqs=2) == (500, 1000)
    assert lengths(max_model_len=100, max_num_batched_tokens=300) == (100, 300)
    assert lengths(num_gpu_blocks_override=4) == (256, 8192)
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    assert lengths() == (8192, 8192)
    with pytest.raises(ConfigError, match="--model DIR is needed"):
        with_limits(BenchEngineArgs(), LIMITS)
