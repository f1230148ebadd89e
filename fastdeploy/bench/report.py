"""The result of a benchmark: a table for people and a file with everything needed to measure it again."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastdeploy.bench.distribution import PERCENTS
from fastdeploy.bench.flags import ResultArgs
from fastdeploy.config.hardware import cuda_devices, memory_bytes, n_usable_cpus
from fastdeploy.errors import ConfigError

PACKAGES = ("fastdeploy", "torch", "triton", "numpy", "tokenizers", "pyzmq", "uvicorn", "uvloop", "httptools")
COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTS), "max")
PLOT_FORMATS = (".png", ".svg", ".pdf")
SECRET_FLAGS = ("--api-key", "--scheduler-password")


@dataclass(slots=True)
class Report:
    """One run of one benchmark; `results` has one entry per workload, each with what the table and the plot need."""

    benchmark: str
    argv: Sequence[str]
    config: Mapping[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        now = datetime.datetime.now(datetime.UTC)
        return {
            "benchmark": self.benchmark,
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round((now - self.started).total_seconds(), 1),
            "command": shown_command(self.argv),
            "versions": versions(),
            "hardware": hardware(),
            "load_average_at_start": round(self.load_average, 2),
            "config": self.config,
            "notes": self.notes,
            "results": self.results,
        }

    def note(self, *texts: str) -> None:
        """Something to know about the figures; told once."""
        self.notes += [text for text in texts if text not in self.notes]

    def finish(self, text: str, args: ResultArgs) -> None:
        """Print `text` with the notes, write the file and draw the plot. Raises ConfigError when a file cannot be."""
        print("\n".join([text, *(f"note: {note}" for note in self.notes)]), flush=True)
        content = self.content()
        if args.output is not None:
            try:
                Path(args.output).write_text(json.dumps(content, indent=1, default=str) + "\n")
            except OSError as exc:
                raise ConfigError(f"--output {args.output}: {exc.strerror}") from None
            print(f"figures: {args.output}")
        if args.plot is not None:
            from fastdeploy.bench.plot import draw

            draw(content, args.plot)
            print(f"plot: {args.plot}")


def check_result_args(args: ResultArgs) -> None:
    """What would only be noticed after a long run. Raises ConfigError."""
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no folder {Path(path).absolute().parent}")
    if args.raw and args.output is None:
        raise ConfigError("--raw: it adds to the file of --output; give that too")
    if args.plot is not None:
        if Path(args.plot).suffix not in PLOT_FORMATS:
            raise ConfigError(f"--plot {args.plot}: the name must end in {', '.join(PLOT_FORMATS)}")
        from fastdeploy.bench.plot import check_matplotlib

        check_matplotlib()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def latency_table(summaries: Mapping[str, Mapping[str, float] | None]) -> str:
    """One row per duration, e.g. {"ttft_ms": {...}}; those without values are left out."""
    rows = [("ms", *COLUMNS)]
    for name, summary in summaries.items():
        if summary is not None:
            label = NAMES.get(name, name)
            rows.append((label, *(number(summary[column]) for column in COLUMNS)))
    return table(rows) if len(rows) > 1 else "no request was answered: there are no latencies"


NAMES: Mapping[str, str] = {
    "ttft_ms": "time to first token (TTFT)",
    "tpot_ms": "time per output token (TPOT)",
    "itl_ms": "between tokens (ITL)",
    "e2e_ms": "end to end (E2E)",
}


def number(value: float) -> str:
    """Thousands with commas; as many digits as tell something."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def shown_command(argv: Sequence[str]) -> str:
    """The command without secrets and without the folders of this machine, which mean nothing elsewhere."""
    words, hide = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        is_secret = name.replace("_", "-") in SECRET_FLAGS
        if hide and not word.startswith("-"):
            words.append("(hidden)")
            continue
        hide = is_secret and not equals
        shown = "(hidden)" if is_secret and equals else _without_folder(value if equals else word)
        words.append(f"{name}={shown}" if equals else shown)
    return " ".join(["fastdeploy bench", *words])


def _without_folder(word: str) -> str:
    return f".../{Path(word).name}" if word.startswith("/") and len(Path(word).parts) > 3 else word


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter for speed, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """CPU, usable cores, memory and GPUs of the machine that this process runs on."""
    return {
        "cpu": _cpu_model(),
        "cores": n_usable_cpus(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpus": [device.name for device in cuda_devices()],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
