"""`fastdeploy check --plan`: what a user reads."""

from pathlib import Path

import pytest

from fastdeploy.config.args import EngineArgs
from fastdeploy.entrypoints import cli
from fastdeploy.entrypoints.plan_report import plan_report
from fastdeploy.errors import ConfigError
from tests.tiny_models import build, edit_config


def test_a_gpu_elsewhere_needs_only_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build(tmp_path / "model", "qwen3_moe", dtype="bfloat16")
    edit_config(folder, torch_dtype="bfloat16")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    argv = ["check", "--plan", "h200", "--model", str(folder), "--max-model-len", "128"]
    assert cli.main([*argv, "--data-parallel-size", "3", "--enable-expert-parallel"]) == 0
    text = capsys.readouterr().out
    # Eight experts on three ranks: two ranks hold three of them, the last holds two.
    assert "3 ranks (data 3 x tensor 1, experts over all of them), each with 140.4 GiB (a GPU, h200)" in text
    assert "ranks 0 to 1, each:" in text and "rank 2:" in text
    assert "fits beside the CUDA context" in text


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", dtype="float32")
    args = EngineArgs(model=str(folder), max_model_len=128, num_gpu_blocks_override=100_000)
    assert "does not fit: rank 0 needs" in plan_report(args, "0.7GiB")


def test_unknown_gpu_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match="--plan a1000: must be h100, h200, b200, or a GPU's memory"):
        plan_report(EngineArgs(model=str(folder)), "a1000")
