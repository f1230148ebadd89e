"""Result files and tables: every figure with its rounds, every ratio with its target, and where it was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from machine import hardware

RESULTS = Path(__file__).parent / "results"
QUIET_LOAD = 0.7  # one-minute load average above which other work would disturb the figures
DISTURBED_SHARE = 0.1  # of one core, taken by processes outside the benchmark during a round


@dataclass(frozen=True, slots=True)
class Spread:
    """Least, median and largest of some rounds."""

    min: float
    median: float
    max: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Raises ValueError without values."""
        if not values:
            raise ValueError("no rounds were measured")
        return Spread(_digits(min(values)), _digits(statistics.median(values)), _digits(max(values)), len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.min:.4g}..{self.max:.4g})"


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the summary. `ratio` is ours over the peer's (or over the limit), None for a plain figure."""

    what: str
    unit: str
    ours: Spread
    peer_name: str = ""
    peer: Spread | None = None
    ratio: float | None = None
    ratio_of_rounds: Spread | None = None
    target: float | None = None
    less_is_better: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the target is met by the ratio or, without a peer, by the figure itself."""
        if self.target is None:
            return None
        value = self.ours.median if self.ratio is None else self.ratio
        return value <= self.target if self.less_is_better else value >= self.target


def compare(
    what: str, unit: str, ours: Sequence[float], peer_name: str, peer: Sequence[float], target: float | None = None
) -> Line:
    """More is better: median over median, and the spread of the ratios of rounds that ran next to each other."""
    a, b = Spread.of(ours), Spread.of(peer)
    by_round = Spread.of([x / y for x, y in zip(ours, peer, strict=True)])
    return Line(what, unit, a, peer_name, b, _digits(a.median / b.median), by_round, target)


def figure(what: str, unit: str, values: Sequence[float], limit: float | None = None) -> Line:
    """A figure of our own, less is better, at most `limit` if given."""
    return Line(what, unit, Spread.of(values), target=limit, less_is_better=True)


@dataclass
class Report:
    """One run of one benchmark."""

    name: str
    title: str
    settings: dict[str, Any]
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    load_average_at_start: float = field(default_factory=lambda: os.getloadavg()[0])
    versions: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    summary: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = {**own_versions(), **self.versions}
        if self.load_average_at_start > QUIET_LOAD:
            text = f"the machine was not idle at the start (load average {self.load_average_at_start:.2f})"
            self.notes.append(text)
            print(f"warning: {text}; the figures may be wrong", file=sys.stderr)

    def add_round(self, **figures: Any) -> None:
        """Keep raw figures and show progress on stderr."""
        self.rounds.append(figures)
        shown = {key: value for key, value in figures.items() if not isinstance(value, (list, dict))}
        print("  ".join(f"{key}={_shown(value)}" for key, value in shown.items()), file=sys.stderr, flush=True)

    def undisturbed(self, measure: Callable[[], dict[str, Any]], n_tries: int) -> dict[str, Any]:
        """The result of a round during which other processes were quiet, or of the last of `n_tries`.

        Which rounds are measured again depends on `foreign_cpu_s` only, never on how fast they were; all are kept.
        """
        for _ in range(n_tries - 1):
            answer = measure()
            if not is_disturbed(answer):
                return answer
            self.rounds[-1]["measured_again"] = True
        return measure()

    def _note_disturbance(self) -> None:
        """Count the rounds in the summary during which processes outside the benchmark took a share of the CPUs."""
        timed = [r for r in self.rounds if "foreign_cpu_s" in r and "measured_again" not in r]
        n_disturbed, n_again = sum(map(is_disturbed, timed)), sum("measured_again" in r for r in self.rounds)
        if timed:
            self.notes.append(
                f"{n_disturbed} of {len(timed)} timed rounds were disturbed by other processes (more than "
                f"{DISTURBED_SHARE:.0%} of a core); {n_again} disturbed rounds were measured again and do not count"
            )

    def finish(self, output: Path | None = None) -> Path:
        """Print the table and write the file; returns its path."""
        self._note_disturbance()
        now = datetime.datetime.now(datetime.UTC)
        content = {
            "benchmark": self.name,
            "title": self.title,
            "date": self.started.strftime("%Y-%m-%d"),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round((now - self.started).total_seconds()),
            "hardware": hardware(),
            "load_average_at_start": round(self.load_average_at_start, 2),
            "versions": self.versions,
            "command": shown_command(sys.argv),
            "settings": self.settings,
            "summary": [{**asdict(line), "reached": line.reached} for line in self.summary],
            "notes": self.notes,
            "rounds": self.rounds,
        }
        path = output or RESULTS / f"{self.name}-{content['date']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")
        print(self.table())
        print(f"raw figures: {path}")
        return path

    def table(self) -> str:
        """The summary as a Markdown table; figures are median (least..largest)."""
        rows = [("what", "unit", "fastdeploy", "peer", "peer's figure", "ratio", "target", "reached")]
        for line in self.summary:
            sign = "<=" if line.less_is_better else ">="
            ratio = "" if line.ratio is None else f"{line.ratio:.4g}"
            if line.ratio_of_rounds is not None:
                ratio += f" ({line.ratio_of_rounds.min:.4g}..{line.ratio_of_rounds.max:.4g})"
            target = "" if line.target is None else f"{sign} {line.target:g}"
            reached = {None: "", True: "yes", False: "NO"}[line.reached]
            peer = "" if line.peer is None else str(line.peer)
            rows.append((line.what, line.unit, str(line.ours), line.peer_name, peer, ratio, target, reached))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return "\n".join([f"\n{self.title}", *lines, *(f"note: {note}" for note in self.notes)])


def is_disturbed(figures: Mapping[str, Any]) -> bool:
    """Whether processes outside the benchmark took a real share of the CPUs during a round."""
    disturbed: bool = figures["foreign_cpu_s"] > DISTURBED_SHARE * figures["wall_s"]
    return disturbed


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_command(argv: Sequence[str]) -> str:
    """The command line without this machine's folders."""
    words = [Path(argv[0]).name, *argv[1:]]
    return "python benchmarks/" + " ".join(f".../{Path(word).name}" if word.startswith("/") else word for word in words)


def own_versions() -> dict[str, Any]:
    """Python, packages of this environment, this project's commit, with "+changes" when the tree differs from it."""
    found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    for package in ("fastdeploy", "torch", "transformers", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    root = Path(__file__).parent.parent
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    found["commit"] = commit + (
        "+changes" if commit and _git(root, "status", "--porcelain", "--", "fastdeploy") else ""
    )
    return found


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def equal_tokens(ours: Sequence[Sequence[int]], peer: Sequence[Sequence[int]]) -> Mapping[str, int]:
    """How far greedy answers agree: whole answers, and tokens before the first difference of each answer."""
    n_same = 0
    for a, b in zip(ours, peer, strict=True):
        differing = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        n_same += next(differing, len(a))
    return {
        "answers_equal": sum(list(a) == list(b) for a, b in zip(ours, peer, strict=True)),
        "answers": len(ours),
        "tokens_equal_before_first_difference": n_same,
        "tokens": sum(map(len, ours)),
    }
