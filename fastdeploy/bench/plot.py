"""The picture of a result: latencies with their percentiles, and throughput, over time where it was followed.

matplotlib is an extra (`pip install 'fastdeploy[bench]'`) and is imported only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fastdeploy.bench.report import COLUMNS, NAMES
from fastdeploy.errors import ConfigError, FastDeployError

BARS = COLUMNS[:-1]
UNTIL = ("ttft_ms", "e2e_ms")


def check_matplotlib() -> None:
    """Raises ConfigError when matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'fastdeploy[bench]'")


def draw(content: Mapping[str, Any], path: str) -> None:
    """Draw the content of a result file; one row of panels per result. Raises FastDeployError when it cannot be."""
    check_matplotlib()
    # Without pyplot: no window, no state that outlives the call.
    canvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    results: Sequence[Mapping[str, Any]] = content["results"]
    figure = import_module("matplotlib.figure").Figure(
        figsize=(15, 4.2 * max(len(results), 1) + 0.6), layout="constrained"
    )
    canvas(figure)
    figure.suptitle(
        f"fastdeploy bench {content['benchmark']}, {content['config'].get('model', '')}, {content['date'][:10]}"
    )
    panels = figure.subplots(max(len(results), 1), 3, squeeze=False)
    for row, result in zip(panels, results, strict=False):
        latencies = {name: result[name] for name in NAMES if result.get(name)}
        _bars(row[0], {name: latencies[name] for name in latencies if name in UNTIL}, result["name"])
        _bars(row[1], {name: latencies[name] for name in latencies if name not in UNTIL}, "per token")
        _throughput(row[2], result)
    try:
        figure.savefig(path, dpi=120)
    except OSError as exc:
        raise FastDeployError(f"--plot {path}: {exc.strerror}") from None


def _bars(panel: Any, latencies: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Groups of bars, one group per statistic."""
    width = 0.8 / max(len(latencies), 1)
    for i, (name, summary) in enumerate(latencies.items()):
        positions = [at + i * width for at in range(len(BARS))]
        bars = panel.bar(positions, [summary[column] for column in BARS], width, label=NAMES[name])
        panel.bar_label(bars, fmt="%.4g", fontsize=7)
    panel.set_xticks([at + 0.4 - width / 2 for at in range(len(BARS))], BARS)
    panel.set_ylabel("ms")
    panel.set_title(title)
    if latencies:
        panel.margins(y=0.25)  # room for the legend
        panel.legend(fontsize=8, loc="upper left")


def _throughput(panel: Any, result: Mapping[str, Any]) -> None:
    over_time = result.get("output_tokens_over_time")
    mean = result["output_tokens_per_s"]
    if over_time:
        edges = [i * over_time["bucket_s"] for i in range(len(over_time["tokens_per_s"]) + 1)]
        panel.stairs(over_time["tokens_per_s"], edges, fill=True, alpha=0.5)
        panel.set_xlabel("seconds")
    panel.axhline(mean, linestyle="--", color="black", linewidth=1, label=f"mean {mean:,.0f}")
    panel.margins(y=0.15)
    panel.set_ylim(bottom=0)
    panel.set_title("output tokens/s")
    panel.legend(fontsize=8, loc="upper left")
