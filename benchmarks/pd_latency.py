"""What a prefill and a decode server gain, and cost, against two mixed servers on as many cores.

    python benchmarks/pd_latency.py                            # demo model, a core each
    python benchmarks/pd_latency.py --cores 8 --model FOLDER   # 18 cores: two for router and clients

Both fleets stand behind a router, with the same cores, and are measured in turn while the other one rests.
Low load: one request at a time; time to first token. Pressure: streams of short prompts decode while long prompts come
in at a steady rate; each stream's time per token (TPOT), and the pauses between its tokens. A round without long
prompts comes first. The picture shows how both are distributed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from pd_pair import ANSWER_S, Node, Pair, make_prompts, vocabulary
from report import Line, Report, Spread, _digits, figure
from sse_client import StreamTimes, stream_completion
from synthetic_fleet import HOST, Program

from fastdeploy.demo.model import build_demo_model

NAME = "pd_latency"
FLAGS = ("--block-size", "16", "--max-num-seqs", "32", "--no-enable-prefix-caching")
TTFT_LIMIT, TPOT_TARGET = 1.3, 2.0
LOW_LENGTHS = (64, 256, 1024)


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What is started meanwhile runs on these only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class PlacedPair(Pair):
    """A pair whose servers have cores of their own."""

    def __init__(self, model: Path, folder: Path, flags: Sequence[str], cores: Sequence[Sequence[int]]) -> None:
        self._cores_of = dict(zip(("prefill", "decode"), cores, strict=True))
        super().__init__(model, folder, flags)

    def start(self, role: Any) -> None:
        with on_cores(self._cores_of[role]):
            super().start(role)


class MixedFleet:
    """Mixed servers behind a router, each with cores of its own."""

    def __init__(self, model: Path, folder: Path, flags: Sequence[str], cores: Sequence[Sequence[int]]) -> None:
        self.router = Program("fastdeploy.router.launch", ["--host", HOST, "--port", "0"], folder / "router")
        self.url = self.router.wait_for(r"Starting server on (http://[^\s,]+)")
        self.nodes = []
        for i, own in enumerate(cores):
            with on_cores(own):
                node = Node(model, folder / f"mixed{i}", "mixed", flags, self.url.removeprefix("http://"))
            self.nodes.append(node)
        deadline_s = time.monotonic() + ANSWER_S
        while httpx.get(f"{self.url}/registered_number", timeout=30).json()["mixed"] < len(cores):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the servers are not registered:\n{self.nodes[-1].console[-2000:]}")
            time.sleep(0.1)

    def close(self) -> None:
        """End all."""
        for program in (*self.nodes, self.router):
            program.stop()


async def low_load(url: str, prompts: Sequence[list[int]]) -> list[StreamTimes]:
    """One request at a time."""
    host, port = _address(url)
    return [await stream_completion(host, port, prompt, 8) for prompt in prompts]


async def pressure(
    url: str, streams: Sequence[list[int]], n_output: int, long_prompts: Sequence[list[int]], every_s: float
) -> tuple[list[StreamTimes], list[StreamTimes]]:
    """(streams that decode, long prompts that come one every `every_s` until the streams have ended)."""
    host, port = _address(url)
    decoding = asyncio.gather(*(stream_completion(host, port, prompt, n_output) for prompt in streams))
    long: list[asyncio.Task[StreamTimes]] = []
    for prompt in long_prompts:
        done, _ = await asyncio.wait([decoding], timeout=every_s)
        if done:
            break
        long.append(asyncio.create_task(stream_completion(host, port, prompt, 2)))
    return list(await decoding), list(await asyncio.gather(*long))


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In ms."""
    ms = np.array(values) * 1000
    return {f"p{p}": round(float(np.percentile(ms, p)), 3) for p in (50, 90, 99)} | {"n": len(values)}


def pauses(times: Sequence[StreamTimes]) -> list[float]:
    """Seconds between neighbouring tokens of a stream."""
    return [b - a for one in times for a, b in zip(one.events_s, one.events_s[1:], strict=False)]


class Measured:
    """One fleet and all that was seen of it: seconds by name."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.values: dict[str, list[float]] = {}

    def run(self, args: argparse.Namespace, n_words: int, seed: int, report: Report) -> None:
        """One round of everything."""
        low = {n: make_prompts(args.n_low, seed + n, n + 1, n_words, shortest=n) for n in LOW_LENGTHS}
        streams = make_prompts(args.streams, seed, 33, n_words, shortest=16)
        long = make_prompts(1000, seed + 1, args.long_tokens + 1, n_words, shortest=args.long_tokens)
        for n, prompts in low.items():
            self._keep(f"ttft {n} tokens", [one.ttft_s for one in asyncio.run(low_load(self.url, prompts))])
        alone, _ = asyncio.run(pressure(self.url, streams, args.n_output, [], 1.0))
        self._keep("tpot alone", [one.tpot_s for one in alone])
        pressed, came = asyncio.run(pressure(self.url, streams, args.n_output, long, args.every))
        self._keep("tpot under pressure", [one.tpot_s for one in pressed])
        self._keep("pauses under pressure", pauses(pressed))
        self._keep("ttft of long prompts", [one.ttft_s for one in came])
        last = {key: percentiles(values) for key, values in self.values.items() if values}
        report.add_round(fleet=self.name, so_far=last, n_long=len(came))
        print(self.name, json.dumps(last), file=sys.stderr, flush=True)

    def _keep(self, name: str, values: Sequence[float]) -> None:
        self.values.setdefault(name, []).extend(values)


def summarise(report: Report, pair: Measured, mixed: Measured) -> None:
    """Lines with targets."""

    def p(one: Measured, name: str, percent: int) -> float:
        return float(np.percentile(one.values[name], percent)) * 1000

    for n in LOW_LENGTHS:
        name = f"ttft {n} tokens"
        ratio = _digits(p(pair, name, 50) / p(mixed, name, 50))
        ours, theirs = ([1000 * value for value in one.values[name]] for one in (pair, mixed))
        line = Line(
            f"{name}, low load", "ms", Spread.of(ours), "mixed", Spread.of(theirs), ratio, None, TTFT_LIMIT, True
        )
        report.summary.append(line)
    for name, target in (("tpot under pressure", TPOT_TARGET), ("pauses under pressure", None)):
        ours, theirs = p(pair, name, 99), p(mixed, name, 99)
        line = Line(f"{name}, p99: how much better", "ms", Spread.of([ours]), "mixed", Spread.of([theirs]))
        report.summary.append(
            Line(line.what, "ms", line.ours, "mixed", line.peer, _digits(theirs / ours), None, target)
        )
    for one in (pair, mixed):
        report.summary.append(figure(f"tpot alone, {one.name}", "ms", [1000 * v for v in one.values["tpot alone"]]))
        if one.values["ttft of long prompts"]:
            values = [1000 * v for v in one.values["ttft of long prompts"]]
            report.summary.append(figure(f"ttft of long prompts, {one.name}", "ms", values))


def draw(pair: Measured, mixed: Measured, path: Path, title: str) -> None:
    """How TTFT at low load, TPOT and pauses under pressure are distributed."""
    picture = import_module("matplotlib.figure").Figure(figsize=(14, 4.5), layout="constrained")
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(picture)
    picture.suptitle(title)
    first, *rest = picture.subplots(1, 3)
    for i, one in enumerate((mixed, pair)):
        at = [k + 0.35 * i for k in range(len(LOW_LENGTHS))]
        medians = [1000 * float(np.median(one.values[f"ttft {n} tokens"])) for n in LOW_LENGTHS]
        first.bar_label(first.bar(at, medians, 0.33, label=one.name), fmt="%.0f", fontsize=7)
    first.set_xticks([k + 0.17 for k in range(len(LOW_LENGTHS))], [f"{n} tokens" for n in LOW_LENGTHS])
    first.set_title("TTFT at low load, median, ms")
    for axes, name in zip(rest, ("tpot under pressure", "pauses under pressure"), strict=True):
        for one in (mixed, pair):
            ms = np.sort(np.array(one.values[name]) * 1000)
            axes.plot(ms, np.arange(1, len(ms) + 1) / len(ms), label=f"{one.name}, p99 {np.percentile(ms, 99):.1f} ms")
        axes.set_xscale("log")
        axes.set_title(f"{name}, ms: share of at most")
        axes.legend(fontsize=8)
    first.legend(fontsize=8)
    picture.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1, help="of each server; two more for router and clients if there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1e6, help="no round begins later than that after the start")
    parser.add_argument("--streams", type=int, default=8, help="that decode at once")
    parser.add_argument("--n-output", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--long-tokens", type=int, default=1500, help="of a long prompt")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between long prompts")
    parser.add_argument("--n-low", type=int, default=10, help="requests of each length at low load")
    parser.add_argument("--model", type=Path, help="a folder; without it the demo model")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    deadline_s = time.monotonic() + 60 * args.minutes
    model = args.model or build_demo_model(show_progress=False)
    there = sorted(os.sched_getaffinity(0))
    first = min(2, max(len(there) - 2 * args.cores, 0))
    own = [there[first + i * args.cores : first + (i + 1) * args.cores] for i in range(2)]
    if not all(len(cores) == args.cores for cores in own):
        raise SystemExit(f"--cores {args.cores}: two servers need {2 * args.cores} cores, there are {len(there)}")
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "output")} | {"server_flags": FLAGS}
    report = Report(NAME, "A prefill and a decode server against two mixed ones", settings)
    flags = [*FLAGS, "--max-model-len", "2048", "--threads", str(args.cores)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, on_cores(there[:first] or there):
        pair_fleet = PlacedPair(model, Path(folder) / "pair", flags, own)
        stack.callback(pair_fleet.close)
        mixed_fleet = MixedFleet(model, Path(folder) / "mixed", flags, own)
        stack.callback(mixed_fleet.close)
        pair, mixed = Measured("pair", pair_fleet.url), Measured("two mixed", mixed_fleet.url)
        warm = argparse.Namespace(**{**vars(args), "n_low": 1, "n_output": 4})
        for one in (Measured("warm", pair.url), Measured("warm", mixed.url)):
            one.run(warm, vocabulary(model), random.randrange(1 << 30), report)
        report.rounds.clear()
        for number in range(args.rounds):
            if time.monotonic() > deadline_s:
                break
            for one in (pair, mixed) if number % 2 else (mixed, pair):
                one.run(args, vocabulary(model), number, report)
    if not report.rounds:
        raise SystemExit("--minutes: no round could begin")
    summarise(report, pair, mixed)
    path = report.finish(args.output)
    draw(pair, mixed, path.with_suffix(".png"), f"{report.title}, {args.cores} cores each, {path.stem}")


if __name__ == "__main__":
    main()
