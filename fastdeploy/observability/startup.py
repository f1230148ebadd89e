"""What the console shows: how far start-up is, where the time went, and a status line while there is work."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from fastdeploy.config.schema import EngineConfig, ParallelConfig
from fastdeploy.observability.logs import CONSOLE
from fastdeploy.wire.messages import LoadProgress, Ready, Status

_logger = logging.getLogger(CONSOLE)
_file_logger = logging.getLogger("fastdeploy.startup")


class StartupReport:
    """Follows one start-up: named stages with their seconds, bars where there is somebody to look at them.

    Stages of this process are timed with `stage`; those of the engine arrive as LoadProgress and, with their exact
    seconds, in Ready. On a terminal a stage is a bar on `stream`; otherwise it is one line in the log when it is over.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._clock = clock
        self._start_s = clock()
        self._stages_s: dict[str, float] = {}
        self._current = ""
        self._current_start_s = self._start_s
        self._bar: tqdm[Any] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage of this process."""
        start_s = self._clock()
        yield
        self._stage_over(name, self._clock() - start_s)

    def on_progress(self, progress: LoadProgress) -> None:
        """The engine got this far."""
        if progress.stage != self._current:
            self._leave_current()
            self._current, self._current_start_s = progress.stage, self._clock()
            if self._interactive:
                self._bar = tqdm(
                    desc=progress.stage,
                    total=progress.total or None,
                    unit=progress.unit,
                    unit_scale=progress.unit == "B",
                    file=self._stream,
                    dynamic_ncols=True,
                    leave=False,
                )
        if self._bar is not None:
            self._bar.total = progress.total or None
            self._bar.update(progress.done - self._bar.n)

    def on_ready(self, config: EngineConfig, ready: Ready, endpoint: str) -> None:
        """The engine takes requests at `endpoint` (a URL, or "" without HTTP): log the closing lines."""
        self._leave_current()
        self._stages_s |= ready.stages_s
        _file_logger.info("Reset block num, the total_block_num:%d, prefill_kvcache_block_num:%d", *[ready.n_pages] * 2)
        for line in ready_lines(config, ready, endpoint, self._stages_s, self._clock() - self._start_s):
            _logger.info(line)

    def close(self) -> None:
        """Take an unfinished bar away, as when start-up failed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _leave_current(self) -> None:
        self.close()
        if self._current:
            self._stage_over(self._current, self._clock() - self._current_start_s)
        self._current = ""

    def _stage_over(self, name: str, seconds: float) -> None:
        self._stages_s[name] = self._stages_s.get(name, 0.0) + seconds
        _logger.info("%s: %.1f s", name, seconds)


def ready_lines(
    config: EngineConfig, ready: Ready, endpoint: str, stages_s: Mapping[str, float], total_s: float
) -> list[str]:
    """The closing lines of a start-up: where the time went, the model, the cache, the endpoint."""
    model, page_tokens = config.model, config.cache.page_tokens
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages_s.items())
    weights = "random weights" if model.random_weights else "weights"
    n_seqs = config.scheduler.max_seqs * len(config.parallel.serves)
    if model.synthetic is not None:
        pace = model.synthetic
        what = (
            f"SYNTHETIC: there is no model, every answer is made up; a step takes {pace.step_ms:g} ms, "
            f"{pace.prompt_token_ms:g} ms for each prompt token and {pace.sequence_ms:g} ms for each running sequence"
        )
    else:
        what = (
            f"model {model.served_name}: {model.shape.architecture}, {model.dtype} on {model.device}, "
            f"{weights} {human_bytes(ready.weight_bytes)}, up to {model.max_model_len} tokens a request"
        )
    return [
        f"started in {total_s:.1f} s" + (f": {stages}" if stages else ""),
        what,
        f"cache {human_bytes(ready.kv_bytes)}: {ready.n_pages} pages of {page_tokens} tokens = "
        f"{ready.n_pages * page_tokens} tokens, up to {n_seqs} requests at once",
        *_parallel_line(config.parallel),
        f"ready at {endpoint}" if endpoint else "ready",
    ]


def _parallel_line(parallel: ParallelConfig) -> list[str]:
    if parallel.n_ranks == 1:
        return []
    experts = f", experts spread over {parallel.n_ranks} ranks" if parallel.expert else ""
    serves = parallel.serves
    here = "" if len(serves) == parallel.data else f"; data-parallel rank {', '.join(map(str, serves))} served here"
    return [f"data parallel {parallel.data} x tensor parallel {parallel.tensor}{experts}{here}"]


def human_bytes(n_bytes: int) -> str:
    """`1536` -> `1.5 KiB`."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class Throughput:
    """Turns successive Status messages of one engine core into a status line, at most one every `interval_s`.

    There is a line while the core works and one when it falls idle. The rates are over the time since the line before,
    or since work began; idle time does not count. A core that starts again, with totals from zero, starts a new window.
    """

    def __init__(self, interval_s: float = 5.0) -> None:
        self._interval_s = interval_s
        self._window: Status | None = None
        self._window_start_s = 0.0
        self._last_line_s = -math.inf

    def update(self, status: Status, now_s: float) -> str | None:
        """The line to show now, or None. `now_s` is a monotonic clock."""
        first, start_s = self._window, self._window_start_s
        if first is None or status.n_steps_total < first.n_steps_total:
            self._window, self._window_start_s = status, now_s
            return None
        idle = status.n_running + status.n_waiting == 0
        if not idle and now_s - start_s < self._interval_s:
            return None
        self._window, self._window_start_s = status, now_s
        worked = status.n_steps_total > first.n_steps_total
        if idle and (not worked or now_s - self._last_line_s < self._interval_s):
            return None
        self._last_line_s = now_s
        return status_line(first, status, now_s - start_s)


def status_line(first: Status, last: Status, seconds: float) -> str:
    """One line about the time between two Status messages that lie `seconds` apart."""
    seconds = max(seconds, 1e-6)
    n_prompt = last.n_prompt_tokens_total - first.n_prompt_tokens_total
    n_cached = last.n_cached_tokens_total - first.n_cached_tokens_total
    n_generated = last.n_generated_tokens_total - first.n_generated_tokens_total
    n_held = last.n_pages_total - last.n_pages_free - last.n_pages_cached
    parts = [
        f"running {last.n_running}, waiting {last.n_waiting}",
        f"KV cache {n_held / max(last.n_pages_total, 1):.0%} used",
        f"prompt {n_prompt / seconds:.0f} tokens/s",
        f"generation {n_generated / seconds:.0f} tokens/s",
    ]
    if n_prompt:
        parts.append(f"prefix hits {n_cached / n_prompt:.0%}")
    if n_preempted := last.n_preempted_total - first.n_preempted_total:
        parts.append(f"{n_preempted} preempted")
    if last.stalled_s >= 1:
        parts.append(f"no progress for {last.stalled_s:.0f} s")
    return " | ".join(parts)
