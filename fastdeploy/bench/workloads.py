"""What is asked: workloads by name, from a file or of given lengths, and their prompts.

A prompt is random token ids: `numpy.random.default_rng(seed).integers(10, 100000, size=n_input)`, drawn request after
request, so that every engine and every run gets the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy.bench.flags import RequestArgs
from fastdeploy.config.flags import suggestion
from fastdeploy.errors import ConfigError

FIRST_ID, END_ID = 10, 100_000
DEFAULT_SEED = 20261121

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Requests of equal lengths, in tokens."""

    n_requests: int
    n_input: int
    n_output: int


BUILT_IN: Mapping[str, Lengths] = MappingProxyType(
    {
        "single": Lengths(1, 128, 256),
        "decode64": Lengths(64, 128, 512),
        "decode256": Lengths(256, 128, 512),
        "mixed": Lengths(1024, 1024, 256),
        "prefill": Lengths(128, 4096, 1),
    }
)
DEFAULT_LENGTHS = Lengths(64, 128, 128)
LIMITS: Mapping[str, int] = MappingProxyType(
    {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 8192}
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `make_ids` gives its prompt, `arrival_s` is when it comes, from the start of the workload."""

    n_input: int
    n_output: int
    make_ids: Callable[[], Ids]
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival, and where they come from. `timed`: their arrival times mean something."""

    name: str
    requests: tuple[Request, ...]
    seed: int
    source: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    timed: bool = False

    @property
    def n_input_tokens(self) -> int:
        """Of all prompts."""
        return sum(request.n_input for request in self.requests)

    @property
    def n_output_tokens(self) -> int:
        """Of all answers, as they were asked for."""
        return sum(request.n_output for request in self.requests)

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "name": self.name,
            "requests": len(self.requests),
            "input_tokens": self.n_input_tokens,
            "output_tokens": self.n_output_tokens,
            "seed": self.seed,
            **self.source,
        }


def make_workload(name: str, lengths: Lengths, seed: int) -> Workload:
    """A workload of equal lengths; the prompts are drawn in order from one generator."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(FIRST_ID, END_ID, size=lengths.n_input) for _ in range(lengths.n_requests)]
    requests = tuple(Request(lengths.n_input, lengths.n_output, partial(_same, ids)) for ids in drawn)
    source = {"input_len": lengths.n_input, "output_len": lengths.n_output}
    return Workload(name, requests, seed, source)


def _same(ids: Ids) -> Ids:
    return ids


def folded(ids: Ids, vocab_size: int | None) -> list[int]:
    """`ids` as ids of a vocabulary, which may be smaller: those beyond it start again from the first one used."""
    if vocab_size is not None and vocab_size < END_ID:
        ids = FIRST_ID + (ids - FIRST_ID) % (vocab_size - FIRST_ID)
    found: list[int] = ids.tolist()
    return found


def vocabulary_notes(vocab_size: int | None) -> tuple[str, ...]:
    """What to tell about a vocabulary that does not hold all ids; raises ConfigError for one that holds none."""
    if vocab_size is None or vocab_size >= END_ID:
        return ()
    if vocab_size <= FIRST_ID:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens is too small: prompts use ids from {FIRST_ID} on")
    return (f"the vocabulary has {vocab_size} tokens: prompt ids are folded into {FIRST_ID}..{vocab_size - 1}",)


def workloads_of(args: RequestArgs) -> list[Workload]:
    """The workloads that the flags describe. Raises ConfigError naming the flag or the file and its entry."""
    sources = {
        "--trace": args.trace is not None,
        "--workload or --workloads": bool(args.workload) or args.workloads is not None,
        "--requests, --input-len, --output-len": any(
            value is not None for value in (args.requests, args.input_len, args.output_len)
        ),
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give only one of them")
    _check_positive(args)
    if args.trace is not None:
        from fastdeploy.bench.traces import trace_workload

        found = [trace_workload(args)]
    elif args.workload or args.workloads:
        found = _named(args)
    else:
        lengths = Lengths(
            args.requests or DEFAULT_LENGTHS.n_requests,
            args.input_len or DEFAULT_LENGTHS.n_input,
            args.output_len or DEFAULT_LENGTHS.n_output,
        )
        found = [make_workload("lengths", lengths, _seed(args, DEFAULT_SEED))]
    return [_first(fitting(workload, args.max_total_len), args.max_requests) for workload in found]


def limits_of(args: RequestArgs) -> Mapping[str, int]:
    """The engine's limits that the workloads are meant for: those of the file, else the built-in ones."""
    return LIMITS if args.workloads is None else {**LIMITS, **_read_file(args.workloads)[2]}


def fitting(workload: Workload, max_total_len: int | None) -> Workload:
    """Without the requests of more tokens; the notes count them. Raises ConfigError when none is left."""
    if max_total_len is None:
        return workload
    kept = tuple(one for one in workload.requests if one.n_input + one.n_output <= max_total_len)
    n_left_out = len(workload.requests) - len(kept)
    if not kept:
        raise ConfigError(
            f"workload {workload.name}: none of its {n_left_out} requests fits into {max_total_len} tokens; "
            "raise --max-model-len (or --max-total-len), or scale the lengths"
        )
    if not n_left_out:
        return workload
    note = f"{n_left_out} of {len(workload.requests)} requests are left out: longer than {max_total_len} tokens"
    return replace(workload, requests=kept, notes=(*workload.notes, note))


def _first(workload: Workload, n_requests: int | None) -> Workload:
    return workload if n_requests is None else replace(workload, requests=workload.requests[:n_requests])


def _seed(args: RequestArgs, default: int) -> int:
    return default if args.workload_seed is None else args.workload_seed


def _named(args: RequestArgs) -> list[Workload]:
    if args.workloads is None:
        seed, known = DEFAULT_SEED, BUILT_IN
    else:
        seed, known, _ = _read_file(args.workloads)
    names: Sequence[str] = args.workload or list(known)
    for name in names:
        if name not in known:
            where = f" in {args.workloads}" if args.workloads else ""
            hint = suggestion(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"--workload {name}: no such workload{where}{hint}")
    return [make_workload(name, known[name], _seed(args, seed)) for name in names]


def _read_file(path: str) -> tuple[int, Mapping[str, Lengths], Mapping[str, int]]:
    """Seed, workloads and engine limits of a file. Raises ConfigError naming the file and the entry."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as exc:
        raise ConfigError(f"--workloads {path}: {exc.strerror}") from None
    except ValueError as exc:
        raise ConfigError(f"--workloads {path}: not JSON ({exc})") from None
    entries = content.get("workloads") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f'--workloads {path}: expected {{"workloads": {{NAME: {{"requests": N, ...}}}}}}')
    known = {}
    for name, entry in entries.items():
        values = [
            entry.get(key) if isinstance(entry, dict) else None for key in ("requests", "input_len", "output_len")
        ]
        if not all(type(value) is int and value > 0 for value in values):
            raise ConfigError(
                f"--workloads {path}: {name} needs the positive integers requests, input_len and output_len"
            )
        known[name] = Lengths(entry["requests"], entry["input_len"], entry["output_len"])
    seed, limits = content.get("seed", DEFAULT_SEED), content.get("limits", {})
    if type(seed) is not int or not isinstance(limits, dict) or not all(type(n) is int for n in limits.values()):
        raise ConfigError(f"--workloads {path}: seed must be an integer, limits an object of integers")
    return seed, known, {name: value for name, value in limits.items() if name in LIMITS}


def _check_positive(args: RequestArgs) -> None:
    for name in ("requests", "input_len", "output_len", "max_requests", "max_total_len", "time_scale", "length_scale"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.trace is None:
        for name in ("time_scale", "length_scale"):
            if getattr(args, name) != 1.0:
                raise ConfigError(f"--{name.replace('_', '-')} is for a --trace")
    if args.workload_seed is not None and args.workload_seed < 0:
        raise ConfigError(f"--workload-seed {args.workload_seed}: must be at least 0")
