"""Recorded requests: when each came and how long it was, and prompts made up for it.

Two formats are read: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's JSONL (timestamp in ms,
input_length, output_length, hash_ids). A hash id stands for a block of 512 prompt tokens; equal ids are equal content,
so equal ids give equal tokens and shared prefixes are shared.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.bench.flags import RequestArgs
from fastdeploy.bench.workloads import DEFAULT_SEED, END_ID, FIRST_ID, Ids, Request, Workload
from fastdeploy.errors import ConfigError

BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_SHARED, _OWN = 0, 1  # two families of seeds: a block that others have too, tokens of one request


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request; `arrival_s` counts from the first one."""

    arrival_s: float
    n_input: int
    n_output: int
    block_ids: tuple[int, ...] = ()


def trace_workload(args: RequestArgs) -> Workload:
    """The workload of `args.trace`, scaled. Raises ConfigError naming the file and the line that is wrong."""
    path = Path(args.trace or "")
    rows, kind = read_trace(path)
    seed = DEFAULT_SEED if args.workload_seed is None else args.workload_seed
    requests = tuple(_request(row, index, args.time_scale, args.length_scale, seed) for index, row in enumerate(rows))
    source = {"trace": path.name, "format": kind, "time_scale": args.time_scale, "length_scale": args.length_scale}
    return Workload(path.stem, requests, seed, source, timed=True)


def read_trace(path: Path) -> tuple[list[TraceRow], str]:
    """The rows in the order of their arrival, and the format's name. Raises ConfigError."""
    try:
        lines = path.read_text().splitlines()
    except OSError as exc:
        raise ConfigError(f"--trace {path}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--trace {path}: not a text file") from None
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("{"):
        kind, rows = "mooncake", _rows(path, enumerate(lines, 1), _mooncake_row)
    elif tuple(name.strip() for name in first.split(",")) == AZURE_COLUMNS:
        kind, rows = "azure", _rows(path, enumerate(lines[1:], 2), _azure_row)
    else:
        raise ConfigError(
            f"--trace {path}: neither Mooncake's JSONL nor Azure's CSV (a header {','.join(AZURE_COLUMNS)})"
        )
    if not rows:
        raise ConfigError(f"--trace {path}: it has no requests")
    rows.sort(key=lambda row: row.arrival_s)
    first_s = rows[0].arrival_s
    return [TraceRow(row.arrival_s - first_s, row.n_input, row.n_output, row.block_ids) for row in rows], kind


def _rows(path: Path, lines: Iterable[tuple[int, str]], parse: Callable[[str], TraceRow]) -> list[TraceRow]:
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = parse(line)
        except (KeyError, TypeError, ValueError) as exc:
            what = f"no {exc}" if isinstance(exc, KeyError) else exc
            raise ConfigError(f"--trace {path}, line {number}: {what}") from None
        if row.n_input < 1 or row.n_output < 0 or not math.isfinite(row.arrival_s):
            raise ConfigError(f"--trace {path}, line {number}: lengths or time out of range: {line[:200]}")
        rows.append(row)
    return rows


def _azure_row(line: str) -> TraceRow:
    columns = next(csv.reader([line]))
    if len(columns) != len(AZURE_COLUMNS):
        raise ValueError(f"expected {len(AZURE_COLUMNS)} columns, got {len(columns)}")
    moment = datetime.fromisoformat(columns[0].strip())
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return TraceRow(moment.timestamp(), int(columns[1]), int(columns[2]))


def _mooncake_row(line: str) -> TraceRow:
    row: dict[str, Any] = json.loads(line)
    n_input, blocks = int(row["input_length"]), tuple(int(block) for block in row["hash_ids"])
    if len(blocks) * BLOCK_TOKENS < n_input:
        raise ValueError(f"{len(blocks)} hash_ids hold {len(blocks) * BLOCK_TOKENS} of {n_input} input tokens")
    return TraceRow(float(row["timestamp"]) / 1000, n_input, int(row["output_length"]), blocks)


def _request(row: TraceRow, index: int, time_scale: float, length_scale: float, seed: int) -> Request:
    """At least one token of prompt and of output, whatever the scale; shared blocks shrink with the lengths."""
    n_input, n_output = _scaled(row.n_input, length_scale), _scaled(row.n_output, length_scale)
    if row.block_ids:
        block_tokens = _scaled(BLOCK_TOKENS, length_scale)
        n_input = min(n_input, block_tokens * len(row.block_ids))
        make_ids = partial(_block_ids, row.block_ids, block_tokens, n_input, seed)
    else:
        make_ids = partial(_draw, (seed, _OWN, index), n_input)
    return Request(n_input, n_output, make_ids, row.arrival_s * time_scale)


def _scaled(n_tokens: int, scale: float) -> int:
    return max(math.ceil(n_tokens * scale - 1e-9), 1)


def _block_ids(block_ids: Sequence[int], block_tokens: int, n_input: int, seed: int) -> Ids:
    """The tokens of the blocks one after the other, cut to the prompt's length."""
    n_blocks = math.ceil(n_input / block_tokens)
    blocks = [_draw((seed, _SHARED, block), block_tokens) for block in block_ids[:n_blocks]]
    return np.concatenate(blocks)[:n_input]


def _draw(seed: tuple[int, ...], n_tokens: int) -> Ids:
    return np.random.default_rng(seed).integers(FIRST_ID, END_ID, size=n_tokens)
