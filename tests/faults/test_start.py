"""What keeps a server from starting, through the real command: one or few lines that name it, and nothing left."""

import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Process, Server
from safetensors.torch import load_file, save_file
from tiny_models import WEIGHTS_FILE, edit_config

pytestmark = pytest.mark.timeout(120)

TIMESTAMPED = re.compile(r"\d\d:\d\d:\d\d ")
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sound(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def failed_start(process: Process) -> tuple[int, list[str]]:
    """Exit status and error lines; there must be nothing else on the console but lines of the log."""
    try:
        status = process.end(60)
        process.check_nothing_left()
    finally:
        process.kill()
    lines = [line for line in process.console.splitlines() if not TIMESTAMPED.match(line)]
    prefix = "fastdeploy: error: "
    assert lines and all(line.startswith(prefix) for line in lines), process.console
    return status, [line.removeprefix(prefix) for line in lines]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def truncate(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, ["model.safetensors", "truncated", "bytes"]),
        (lambda f: (f / WEIGHTS_FILE).unlink(), ["safetensors"]),
        (
            lambda f: change_tensors(f, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight")),
            ["model.layers.1.self_attn.q_proj.weight", "missing"],
        ),
        (
            lambda f: change_tensors(f, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)})),
            ["model.norm.weight", "[65]", "[64]"],
        ),
        (lambda f: (f / "config.json").write_text('{"a": '), ["config.json", "JSON"]),
        (lambda f: edit_config(f, architectures=["FooForCausalLM"]), ["config.json", "FooForCausalLM", "Ernie4_5"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("[]"), ["tokenizer.json"]),
    ],
    ids=["truncated", "no weights", "no tensor", "shape", "config", "architecture", "no tokenizer", "tokenizer"],
)
def test_damaged_model(folder: Path, tmp_path: Path, damage: Damage, named: list[str]) -> None:
    damage(folder)
    status, lines = failed_start(Server(folder, tmp_path / "run"))
    assert status in (1, 2) and len(lines) == 1
    assert str(folder) in lines[0] and all(name in lines[0] for name in named), lines


def test_missing_shard(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("ernie4_5_moe", "sharded", tokenizer=True), tmp_path / "model"))
    (shard,) = folder.glob("model-00002-of-*")
    shard.unlink()
    status, (line,) = failed_start(Server(folder, tmp_path / "run"))
    assert status in (1, 2) and str(shard) in line


def test_no_memory_for_pages(sound: Path, tmp_path: Path) -> None:
    status, (line,) = failed_start(Server(sound, tmp_path / "run", "--num-gpu-blocks-override", "1000000000"))
    assert status == 2
    assert re.search(r"--num-gpu-blocks-override 1000000000: .* take [\d,]+ bytes .*; at most \d+ fit", line)


def test_several_wrong_flags_at_once(sound: Path, tmp_path: Path) -> None:
    flags = ("--max-num-seqs", "0", "--block-size", "-3", "--gpu-memory-utilization", "7", "--max-model-len", "999999")
    status, lines = failed_start(Server(sound, tmp_path / "run", *flags))
    assert status == 2
    assert sorted(line.split()[0] for line in lines) == sorted(flags[::2])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--max-num-sequences", "4"), ["--max-num-sequences", "--max-num-seqs"]),
        (("--max-num-seqs", "many"), ["--max-num-seqs", "many"]),
        (("--model", "/no/such/model"), ["/no/such/model"]),
        (("--tokenizer", "/no/such/tokenizer"), ["/no/such/tokenizer"]),
        (("--chat-template", "{% nothing %}"), ["--chat-template"]),
    ],
)
def test_wrong_flag(sound: Path, tmp_path: Path, flags: tuple[str, str], named: list[str]) -> None:
    status, (line,) = failed_start(Server(sound, tmp_path / "run", *flags))
    assert status in (1, 2) and all(name in line for name in named), line


def test_busy_port(sound: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, (line,) = failed_start(Server(sound, tmp_path / "run", "--port", port))
    assert status == 2 and f"--port {port}" in line


def test_log_folder_that_cannot_be(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, (line,) = failed_start(Server(sound, tmp_path / "run", env={"FD_LOG_DIR": str(tmp_path / "file" / "log")}))
    assert status == 2 and "FD_LOG_DIR" in line


def test_llm_raises_what_the_engine_failed_with(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    script = (
        "from fastdeploy import LLM\n"
        "from fastdeploy.errors import CheckpointError\n"
        f"try: LLM({str(folder)!r}, device='cpu', dtype='float32')\n"
        "except CheckpointError as error: raise SystemExit(f'fastdeploy: error: {error}')\n"
    )
    status, (line,) = failed_start(Process(["-c", script], tmp_path / "run"))
    assert status == 1 and "model.norm.weight" in line
