"""What breaks between a prefill and a decode server, and what is left of it.

    python benchmarks/pd_faults.py --rounds 5

The demo model on a CPU, a router, one server of each role, all real processes. Each round sends requests at once (half
streamed; greedy, seeded, with log-probabilities, with two answers) and breaks something meanwhile. Every answer is
compared, token for token, with that of a mixed server. Afterwards no server may hold a page of anybody.
kill: SIGKILL to the server, which is started again at once. stop: SIGSTOP to all its processes, for 10 s. full: decode
has pages for few requests. abort: clients leave at random. restart: SIGTERM and a new one.
Recovery: from the fault (of a stop, and where the load is the fault, from its end) until the router's answer is right
again and came from both servers; the question stands behind all others.
Ends with status 1 when a check fails. With --faults the others are kept as they are in the result file.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from machine import hardware
from pd_pair import Node, Outcome, Pair, Role, ask, ask_all, body_of, make_prompts
from report import RESULTS, own_versions, shown_command
from synthetic_fleet import metrics_of

from fastdeploy.demo.model import build_demo_model

FAULTS = ("kill-prefill", "kill-decode", "stop-prefill", "stop-decode", "full", "abort", "restart-prefill")
FAULTS += ("restart-decode",)
FLAGS = ("--max-model-len", "512", "--block-size", "16", "--max-num-seqs", "16", "--no-enable-prefix-caching")
STOP_S = 10.0
RECOVERY_LIMIT_S = 15.0
LET_GO_S = 100.0  # channels and peers that nobody uses are kept for a minute


async def recover(pair: Pair, body: dict[str, Any], expected: Outcome, since_s: float) -> float:
    """Ask until an answer is right and its pages have travelled; seconds since `since_s`."""
    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() - since_s < 120:
            before = await pulled(pair)
            found = await ask(client, pair.url, body, stream=False)
            if found.verdict(expected) == "right" and await pulled(pair) > before:
                return time.monotonic() - since_s
            await asyncio.sleep(0.1)
    raise RuntimeError("the pair did not recover within 120 s")


async def pulled(pair: Pair) -> float:
    """Requests that decode served with pages of prefill; -1 while it does not say."""
    try:
        return await asyncio.to_thread(pair.nodes["decode"].metric, "pd_pulled_requests_total")
    except OSError:
        return -1.0


def strike(pair: Pair, fault: str) -> None:
    """Begin the fault."""
    kind, _, role = fault.partition("-")
    if role not in ("prefill", "decode"):
        return
    node = pair.nodes[role]
    if kind == "stop":
        node.signal_all(signal.SIGSTOP)
        return
    if kind == "kill":
        node.kill()
    else:
        node.process.terminate()  # it finishes what it has; the new one starts meanwhile
    pair.start(role)


async def one_round(
    pair: Pair, fault: str, bodies: Sequence[dict[str, Any]], expected: Sequence[Outcome], rng: random.Random
) -> dict[str, Any]:
    """Requests, the fault, what came of them, and what is left."""
    leave_s = [rng.random() * 4 if fault == "abort" and rng.random() < 0.6 else None for _ in bodies]
    start_s = time.monotonic()
    async with httpx.AsyncClient(timeout=None) as client:
        asked = [
            asyncio.create_task(ask(client, pair.url, body, stream=i % 2 == 0, leave_after_s=leave_s[i]))
            for i, body in enumerate(bodies)
        ]
        await asyncio.sleep(0.3 + 2 * rng.random())
        since_s = time.monotonic()
        await asyncio.to_thread(strike, pair, fault)
        if fault.startswith("stop"):
            await asyncio.sleep(STOP_S)
            role: Role = "prefill" if fault.endswith("prefill") else "decode"
            pair.nodes[role].signal_all(signal.SIGCONT)
            since_s = time.monotonic()
        if fault in ("full", "abort"):  # the load is the fault
            await asyncio.wait(asked)
            since_s = time.monotonic()
        probe = asyncio.create_task(recover(pair, bodies[0], expected[0], since_s))
        outcomes = await asyncio.gather(*asked)
        recovery_s = await probe
    answers_s = time.monotonic() - start_s
    verdicts = [found.verdict(right) for found, right in zip(outcomes, expected, strict=True)]
    settle_s, left = await asyncio.to_thread(pair.settle)
    fallbacks = {k: v for k, v in metrics_of(pair.nodes["decode"].url).items() if "pd_fallbacks_total{" in k}
    return {
        "verdicts": dict(Counter(verdicts)),
        "wrong": [i for i, verdict in enumerate(verdicts) if verdict == "wrong"],
        "errors": Counter(found.error[:160] for found in outcomes if found.error).most_common(3),
        "recovery_s": round(recovery_s, 2),
        "answers_s": round(answers_s, 2),
        "settle_s": round(settle_s, 2),
        "left": {role: {k: v for k, v in one.items() if v} for role, one in left.items()},
        "fallbacks_so_far": fallbacks,
    }


def descriptors(pair: Pair) -> dict[str, int]:
    """Open files and sockets by role."""
    return {role: node.n_descriptors() for role, node in pair.nodes.items()}


def wait_descriptors(pair: Pair, before: dict[str, int]) -> dict[str, int]:
    """Once they are no more than before, or after a while as they are."""
    deadline_s = time.monotonic() + LET_GO_S
    while True:
        now = descriptors(pair)
        if all(now[role] <= before[role] for role in now) or time.monotonic() > deadline_s:
            return now
        time.sleep(1)


def run_fault(
    args: argparse.Namespace, fault: str, folder: Path, bodies: list[dict[str, Any]], expected: list[Outcome]
) -> dict[str, Any]:
    """All rounds of one fault with one pair."""
    flags = [*FLAGS, "--data-parallel-size", str(args.dp)]
    if args.dp > 1:
        flags.append("--enable-expert-parallel")
    decode_flags = ["--num-gpu-blocks-override", "40"] if fault == "full" else []
    pair, rng, rounds = Pair(args.model, folder, flags, decode_flags), random.Random(fault), []
    try:
        asyncio.run(ask_all(pair.url, bodies[:16], 16, stream=None))  # connections that are kept
        pair.settle()
        before = descriptors(pair)
        for number in range(args.rounds):
            found = asyncio.run(one_round(pair, fault, bodies, expected, rng))
            rounds.append(found)
            print(fault, number, json.dumps(found), file=sys.stderr, flush=True)
        after = wait_descriptors(pair, before)
    finally:
        pair.close()
    return {"dp": args.dp, "rounds": rounds, "descriptors_before": before, "descriptors_after": after}


def checks(found: dict[str, Any]) -> dict[str, bool]:
    """What must hold of one fault."""
    rounds = found["rounds"]
    slack = 4  # connections that the router keeps for the next request
    return {
        "no wrong token": not any("wrong" in one["verdicts"] for one in rounds),
        "no end without a reason": not any("no reason" in one["verdicts"] for one in rounds),
        "no page is held afterwards": not any(held for one in rounds for held in one["left"].values()),
        f"recovery within {RECOVERY_LIMIT_S:g} s": max(one["recovery_s"] for one in rounds) <= RECOVERY_LIMIT_S,
        "no descriptor is left": all(
            n <= found["descriptors_before"][role] + slack for role, n in found["descriptors_after"].items()
        ),
    }


def expected_answers(model: Path, folder: Path, bodies: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Of a mixed server."""
    node = Node(model, folder, "mixed", FLAGS)
    try:
        found = asyncio.run(ask_all(node.url, bodies, 16, stream=False))
    finally:
        node.stop()
    if not all(one.finished for one in found):
        raise RuntimeError(f"the mixed server failed: {[one.error for one in found if one.error][:3]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each fault")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--requests", type=int, default=50, help="at once")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks of each server")
    parser.add_argument("--model", type=Path, help="a folder; without it the demo model")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with it
    args.model = args.model or build_demo_model(show_progress=False)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = args.output or RESULTS / f"pd_faults-{date}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    prompts = make_prompts(args.requests, 5, 160)
    bodies = [body_of(number, prompt, args.max_tokens) for number, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        expected = expected_answers(args.model, Path(folder) / "mixed", bodies)
        for fault in args.faults.split(","):
            name = fault if args.dp == 1 else f"{fault}, {args.dp} ranks each"
            found = run_fault(args, fault, Path(folder) / fault, bodies, expected)
            results[name] = {"checks": checks(found), **found}
            content = {
                "benchmark": "pd_faults",
                "date": date,
                "hardware": hardware(),
                "versions": own_versions(),
                "command": shown_command(sys.argv),
                "settings": {"requests": args.requests, "max_tokens": args.max_tokens, "server_flags": FLAGS},
                "results": results,
            }
            path.write_text(json.dumps(content, indent=1) + "\n")
            print(name, json.dumps(results[name]["checks"]), flush=True)
    return 0 if all(all(one["checks"].values()) for one in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
