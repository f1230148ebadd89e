"""What breaks behind and in front of the router, and what is left of it: kills, a restart, clients that leave.

    python benchmarks/router_faults.py

Synthetic servers behind fd-router, all real processes.
kill: SIGKILL to a server while requests are in flight, more than the servers can run. Every answer is compared with
the one that its prompt must give. Lost is a request that had got no token and did not get its whole answer.
restart: SIGKILL to the router and a new one at its port. How long until all servers are registered again.
leave: clients close their connection at random: in the middle of the request, at once behind it, in the middle of the
answer, or not at all. Afterwards nobody may hold anything of theirs.
Ends with status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil
import uvloop
from machine import hardware
from report import RESULTS, own_versions, shown_command
from synthetic_fleet import Fleet, Router, metrics_of

from fastdeploy.config.synthetic import BYTE_EOS
from fastdeploy.executor.synthetic import made_up_answer

PACE = {"step_ms": 20.0, "prompt_token_ms": 0.02, "sequence_ms": 0.05}
FLAGS = ("--max-num-seqs", "16", "--max-model-len", "2048")
RETURN_LIMIT_S = 6.0
SETTLE_S = 20.0
ANSWER_S = 120.0
FATES = ("half_request", "at_once", "soon", "mid_answer", "whole")
OF_SERVERS = ("num_requests_running", "num_requests_waiting")


@dataclass(slots=True)
class Outcome:
    """What a client saw of its request."""

    n_events: int = 0
    text: str = ""
    error: str = ""
    is_done: bool = False
    is_right: bool = False


def body_of(index: int, n_tokens: int, is_stream: bool = True) -> tuple[bytes, str]:
    """The JSON of a request that no other is like, and its whole answer."""
    prompt = f"request {index}: {random.Random(index).randbytes(16).hex()}"
    answer = bytes(made_up_answer(list(prompt.encode()), n_tokens, {BYTE_EOS})).decode()
    fields = {"prompt": prompt, "max_tokens": n_tokens, "ignore_eos": True, "stream": is_stream}
    return msgspec.json.encode(fields), answer


def http_request(body: bytes) -> bytes:
    """Of a client that closes afterwards."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def read_events(reader: asyncio.StreamReader, outcome: Outcome, at_most: int = 1 << 30) -> None:
    """Take in the stream until its end, or until so many events have come."""
    while outcome.n_events < at_most and (line := await reader.readline()):
        if line.startswith(b"{"):
            outcome.error = line.decode()  # an answer that is no stream
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            outcome.is_done = True
            return
        event = json.loads(line[6:])
        if "error" in event:
            outcome.error = event["error"]["message"] or "?"
        elif event["choices"] and event["choices"][0]["text"]:
            outcome.n_events += 1
            outcome.text += event["choices"][0]["text"]


async def ask(url: str, index: int, n_tokens: int) -> Outcome:
    """One whole request."""
    parts = urlsplit(url)
    body, expected = body_of(index, n_tokens)
    outcome = Outcome()
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(http_request(body))
            await read_events(reader, outcome)
            writer.close()
    except (OSError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.is_right = outcome.is_done and not outcome.error and outcome.text == expected
    return outcome


async def kill_one(fleet: Fleet, n_requests: int) -> dict[str, Any]:
    """All requests at once; the first server dies when some answers have begun and others have not."""
    n_tokens = 100  # about two seconds
    tasks = [asyncio.create_task(ask(fleet.router.url, i, n_tokens)) for i in range(n_requests)]
    await asyncio.sleep(1.0)
    at_kill = metrics_of(fleet.router.url)
    fleet.servers[0].kill()
    outcomes = await asyncio.gather(*tasks)
    cut = [one for one in outcomes if not one.is_right and one.n_events > 0]
    lost = [one for one in outcomes if not one.is_right and one.n_events == 0]
    return {
        "n_requests": n_requests,
        "n_at_killed_server": int(at_kill[f'router_server_requests{{server="{fleet.urls[0]}"}}']),
        "n_right": sum(one.is_right for one in outcomes),
        "n_cut_with_error": sum(bool(one.error) and one.is_done for one in cut),
        "n_cut_without_error": sum(not (one.error and one.is_done) for one in cut),
        "n_lost": len(lost),
        "n_retries": int(metrics_of(fleet.router.url)["router_retries_total"]),
        "errors": Counter(one.error for one in (*cut, *lost)).most_common(4),
    }


async def restart_router(fleet: Fleet, folder: Path) -> dict[str, Any]:
    """The servers find the new router by themselves."""
    port = urlsplit(fleet.router.url).port or 0
    fleet.router.kill()
    fleet.router = Router(folder / "router again", {}, port)
    return_s = fleet.wait_registered()
    outcomes = await asyncio.gather(*(ask(fleet.router.url, i, 4) for i in range(32)))
    return {"n_servers": len(fleet.servers), "return_s": return_s, "n_right_of_32": sum(o.is_right for o in outcomes)}


async def leave(url: str, index: int, fate: str, rng: random.Random) -> Outcome:
    """One client with a fate of `FATES`."""
    parts = urlsplit(url)
    body, expected = body_of(index, 12, is_stream=fate in ("mid_answer", "whole") or rng.random() < 0.5)
    request, outcome = http_request(body), Outcome()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request[: rng.randrange(1, len(request))] if fate == "half_request" else request)
        if fate == "soon":
            await asyncio.sleep(rng.random() * 0.3)
        elif fate == "mid_answer":
            await read_events(reader, outcome, rng.randrange(1, 10))
        elif fate == "whole":
            await read_events(reader, outcome)
            outcome.is_right = outcome.is_done and outcome.text == expected
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
    return outcome


async def leave_at_random(fleet: Fleet, n_requests: int, concurrency: int) -> dict[str, Any]:
    """Clients come and leave; then what is left of them is looked for until nothing is."""
    process = psutil.Process(fleet.router.process.pid)
    url, rng, counts, wrong = fleet.router.url, random.Random(7), Counter[str](), 0
    before = held(fleet, process)
    fates = iter([(i, rng.choice(FATES)) for i in range(n_requests)])

    during: dict[str, float] = {}

    async def client() -> None:
        nonlocal wrong, during
        for index, fate in fates:
            outcome = await asyncio.wait_for(leave(url, index, fate, rng), ANSWER_S)
            counts[fate] += 1
            wrong += fate == "whole" and not outcome.is_right
            if counts.total() == n_requests // 2:
                during = await asyncio.to_thread(held, fleet, process)

    start_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    took_s = time.monotonic() - start_s
    rss_mib = process.memory_info().rss / 2**20
    left = await settled(lambda: held(fleet, process))
    aborted = [abort_all(one) for one in fleet.urls]
    return {
        "n_requests": n_requests,
        "concurrency": concurrency,
        "seconds": took_s,
        "fates": dict(counts),
        "n_wrong_answers": wrong,
        "clients_gone_counted": int(metrics_of(url)["router_clients_gone_total"]),
        "before": before,
        "during": during,
        "left": left,
        "requests_alive_in_front_ends": aborted,
        "router_rss_mib": round(rss_mib, 1),
    }


def held(fleet: Fleet, router: psutil.Process) -> dict[str, float]:
    """What somebody holds of requests: counters of the router and the servers, connections of the router."""
    figures = metrics_of(fleet.router.url)
    found = {"router_requests_in_flight": figures["router_requests_in_flight"]}
    for name in ("router_server_requests", "router_server_tokens"):
        found[name] = sum(value for key, value in figures.items() if key.startswith(f"{name}{{"))
    of_servers = [metrics_of(url) for url in fleet.urls]
    for name in OF_SERVERS:
        found[name] = sum(
            sum(v for key, v in one.items() if key.partition("{")[0].endswith(name)) for one in of_servers
        )
    port = urlsplit(fleet.router.url).port
    connections = [one for one in router.net_connections("tcp") if one.status != psutil.CONN_LISTEN and one.raddr]
    found["connections_of_clients"] = sum(one.laddr.port == port for one in connections) - n_registering(
        connections, port
    )
    return found


def n_registering(connections: Sequence[Any], port: int | None) -> int:
    """Connections that the servers keep for their heartbeats, which belong to no request: known by their other end."""
    # Both ports: the system gives one port to several connections when they lead to different places.
    owners = {(one.laddr.port, one.raddr.port): one.pid for one in psutil.net_connections("tcp") if one.raddr}
    others = [owners.get((one.raddr.port, port)) for one in connections if one.laddr.port == port]
    return sum(pid not in (None, psutil.Process().pid) for pid in others)


async def settled(look: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures once all are zero, or after a while as they are."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        found = look()
        if not any(found.values()) or time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(0.2)


def abort_all(url: str) -> int:
    """How many requests a server still knew; they are ended."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/abort_requests", b'{"abort_all": true}', headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return len(json.load(response)["result"]["aborted"])


async def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The three parts, one after the other."""
    found: dict[str, Any] = {}
    paces = [PACE] * args.servers
    with Fleet(folder / "kill", {}, paces, FLAGS) as fleet:
        found["kill"] = await kill_one(fleet, args.in_flight)
    with Fleet(folder / "rest", {}, paces, FLAGS) as fleet:
        found["leave"] = await leave_at_random(fleet, args.requests, args.concurrency)
        found["restart"] = await restart_router(fleet, folder)
    return found


def checks(found: dict[str, Any]) -> dict[str, bool]:
    """What must hold."""
    kill, left, restart = found["kill"], found["leave"], found["restart"]
    return {
        "the killed server had requests": kill["n_at_killed_server"] > 0,
        "no request without a token was lost": kill["n_lost"] == 0,
        "every cut answer ends with an error": kill["n_cut_without_error"] == 0,
        "all others are right": kill["n_right"] + kill["n_cut_with_error"] == kill["n_requests"],
        f"servers are back within {RETURN_LIMIT_S:g} s": restart["return_s"] <= RETURN_LIMIT_S,
        "a restarted router answers": restart["n_right_of_32"] == 32,
        "whole answers are right while others leave": left["n_wrong_answers"] == 0,
        "a look during the load finds requests": left["during"]["router_requests_in_flight"] > 0
        and left["during"]["connections_of_clients"] > 0,
        "nothing is held of those that left": not any(left["left"].values()),
        "front ends know no request": not any(left["requests_alive_in_front_ends"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--in-flight", type=int, default=200, help="requests when a server is killed")
    parser.add_argument("--requests", type=int, default=10_000, help="of clients that may leave")
    parser.add_argument("--concurrency", type=int, default=64, help="of those")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    now = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(run(args, Path(folder)))
    held_checks = checks(found)
    content = {
        "benchmark": "router_faults",
        "date": now.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": own_versions(),
        "command": shown_command(sys.argv),
        "settings": {"servers": args.servers, "pace": PACE, "server_flags": FLAGS},
        "checks": held_checks,
        "results": found,
    }
    path = args.output or RESULTS / f"router_faults-{content['date']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({"checks": held_checks, **found}, indent=1))
    return 0 if all(held_checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
