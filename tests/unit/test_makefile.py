"""The Makefile, the pinned versions and the gate: what can be checked of them without installing anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
TARGETS = ("demo", "serve", "test", "lint", "bench", "install", "clean")


def make(*args: str) -> subprocess.CompletedProcess[str]:
    """`make ARGS` in the repository, as if this were not run by make itself."""
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", "-C", str(ROOT), *args], env=environ, capture_output=True, text=True, timeout=50)


def finished_venv(folder: Path) -> Path:
    """A folder that make takes for an environment with everything in it; its python is the one of this test."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    for stamp in (".made", ".run", ".dev"):
        (folder / stamp).touch()
    return folder


def test_help_is_the_default_and_lists_every_target() -> None:
    shown = make()
    assert shown.returncode == 0
    assert make("help").stdout == shown.stdout
    assert [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("  make ")] == ["help", *TARGETS]


def test_missing_python_is_named(tmp_path: Path) -> None:
    done = make("demo", f"VENV={tmp_path / 'venv'}", "CANDIDATES=python9.1 python9.2")
    assert done.returncode == 2
    assert "Python 3.11 or 3.12 is needed; looked for python9.1 python9.2 in PATH." in done.stderr
    assert not (tmp_path / "venv").exists()


def test_wrong_python_is_refused(tmp_path: Path) -> None:
    done = make("demo", f"VENV={tmp_path / 'venv'}", "PYTHON=false")
    assert done.returncode == 2
    assert "PYTHON=false is not Python 3.11 or 3.12" in done.stderr


def test_python_without_ensurepip_gets_the_debian_hint(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = make("demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode == 2
    assert f"apt install python3.{sys.version_info.minor}-venv" in done.stderr


def test_environment_is_made_again_when_dependencies_change(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path / "venv")
    assert "install" not in make("-n", "demo", f"VENV={venv}").stdout
    os.utime(venv / ".run", (0, 0))  # older than pyproject.toml and constraints.txt
    commands = make("-n", "test", f"VENV={venv}").stdout
    assert '-e ".[demo]"' in commands
    assert '-e ".[dev]"' in commands
    assert "-m venv" not in commands


def test_install_puts_a_working_command_into_the_prefix(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path / "venv")
    done = make("install", f"VENV={venv}", f"PREFIX={tmp_path / 'usr'}")
    assert done.returncode == 0, done.stderr
    command = tmp_path / "usr" / "bin" / "fastdeploy"
    shown = subprocess.run([command, "--version"], cwd="/", capture_output=True, text=True, timeout=50)
    assert shown.stdout.startswith("fastdeploy ")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {normal(name): version for name, version in found.items()}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_dependency_and_name_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?:|file:|--|(^|\s)/", text)
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values())  # no local build such as +cpu
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["dev"]]
    names = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}  # type: ignore[index]
    assert names - pins().keys() == set()


def test_gate_is_make_test() -> None:
    gate = ROOT / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    lines = gate.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "exec make test"
