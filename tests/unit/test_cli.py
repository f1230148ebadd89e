"""The `fastdeploy` command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastdeploy import __version__
from fastdeploy.entrypoints import cli

pytestmark = pytest.mark.timeout(120)

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "starlette", "uvicorn", "prometheus_client")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in shown
    assert cli.main([]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdeploy {__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"], ["check"], ["demo-model", "--help"]])
def test_answers_without_heavy_imports(argv: list[str]) -> None:
    code = f"""
import sys
from fastdeploy.entrypoints.cli import main
try:
    status = main({argv!r})
except SystemExit as exc:
    status = exc.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules], status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: [] 0"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serv"], "fastdeploy: error: no subcommand 'serv'; did you mean serve?"),
        (["check", "--mdel", "x"], "fastdeploy: error: --mdel: no such flag; did you mean --model?"),
        (["demo-model", "--form", "x"], "fastdeploy: error: --form: invalid choice: 'x'"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(message)


def test_failures_have_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy.errors import EngineStartError

    server = ModuleType("api_server")

    def fail(argv: list[str]) -> None:
        raise EngineStartError("it did not start")

    server.main = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastdeploy.entrypoints.openai.api_server", server)
    assert cli.main(["serve", "x"]) == 1
    assert capsys.readouterr().err == "fastdeploy: error: it did not start\n"


def test_serve_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    server = ModuleType("api_server")
    server.main = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastdeploy.entrypoints.openai.api_server", server)
    assert cli.main(["serve", "/model", "--port", "1"]) == 0
    assert cli.main(["serve", "--port", "1"]) == 0
    assert seen == [["--model", "/model", "--port", "1"], ["--port", "1"]]


def test_demo_model_prints_the_folder_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def build(form: str, show_progress: bool) -> Path:
        seen.append((form, show_progress))
        return Path("/demo")

    import fastdeploy.demo.model

    monkeypatch.setattr(fastdeploy.demo.model, "build_demo_model", build)
    assert cli.main(["demo-model", "--form", "dense", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "/demo"
    assert seen == [("dense", False)]


def test_check_with_a_model_prints_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["check", "--model", str(tmp_path), "--device", "cpu", "--max-num-seqs", "3"]) == 0
    report, _, shown = capsys.readouterr().out.partition("\n\n")
    assert "python: " in report
    assert json.loads(shown)["scheduler"]["max_seqs"] == 3


def test_environment_report_shows_no_secrets() -> None:
    report = cli.environment_report({"FD_API_KEY": "sesame", "FD_LOG_DIR": "/logs", "CUDA_VISIBLE_DEVICES": "0"})
    assert "sesame" not in report
    assert "log folder: /logs" in report
    assert "CUDA_VISIBLE_DEVICES=0" in report
