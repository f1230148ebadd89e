"""What the router costs: requests and stream events through it, against the same without it, on the same cores.

    python benchmarks/router_relay.py

One client, one made-up server (uvloop and httptools, constant bytes) and the router, each one process. Rounds with and
without the router take turns, and with nginx and haproxy too where they are installed (one worker, buffering off, kept
connections), and with sglang-router and vllm-router from the environment that --peer-programs names. Three loads,
closed loop: one connection (latency), N connections with a small JSON answer, and N streams of 64 events written one by
one; of streams the first event is timed too. `cpu_us` is CPU time of the proxy's processes per request or event;
1e6 / cpu_us is what one core can do when nothing else runs on it. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httptools
import uvloop
from machine import cpu_s, hardware
from report import own_versions, shown_command

from fastdeploy.bench.connection import Collected, HttpClient

N_EVENTS = 64
BODY = json.dumps({"messages": [{"role": "user", "content": "word " * 40}], "max_tokens": 64}).encode()
STREAM_BODY = BODY[:-1] + b', "stream": true}'
PATH = "/v1/chat/completions"
ANSWER = json.dumps({"id": "x", "choices": [{"index": 0, "message": {"content": "y" * 200}}]}).encode()
EVENT = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"word"},"finish_reason":null}]}\n\n'
DIRECT, ROUTER, WORKERS = "direct", "router", "router, 2 workers"
HAPROXY_CONF = """
global
  maxconn 4096
  nbthread 1
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend front
  bind 127.0.0.1:{port}
  default_backend servers
backend servers
  http-reuse always
  server one 127.0.0.1:{upstream}
"""
NGINX_CONF = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream servers {{ server 127.0.0.1:{upstream}; keepalive 128; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 1000000;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    location / {{ proxy_pass http://servers; }}
  }}
}}
"""


class _Upstream(asyncio.Protocol):
    """The made-up server: one connection."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:  # a router that tries HTTP/2 first
            self._transport.close()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        # By what it says: routers write the JSON anew. All else, health checks too, gets the JSON answer.
        is_stream, self._body = b'"stream":true' in self._body.replace(b" ", b""), b""
        if not is_stream:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
            self._transport.write(head + ANSWER)
            return
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        asyncio.get_running_loop().call_soon(self._event, 0)

    def _event(self, i: int) -> None:
        if i == N_EVENTS:
            self._transport.write(b"0\r\n\r\n")
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
        asyncio.get_running_loop().call_soon(self._event, i + 1)


async def _serve_upstream() -> None:
    server = await asyncio.get_running_loop().create_server(_Upstream, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def child(command: Sequence[str], folder: Path, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the context."""
    env = {**os.environ, "FD_LOG_DIR": str(folder / "log")}
    process = subprocess.Popen(command, text=True, env=env, **more)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def _start_router(stack: ExitStack, folder: Path, upstream: int, policy: str, workers: int = 1) -> tuple[int, int]:
    """Port and process id of a router that knows the server."""
    command = [sys.executable, "-m", "fastdeploy.router.launch", "--host", "127.0.0.1", "--port", "0"]
    process = stack.enter_context(
        child([*command, "--policy", policy, "--workers", str(workers)], folder, stderr=subprocess.PIPE)
    )
    assert process.stderr is not None
    found = None
    while found is None:
        line = process.stderr.readline()
        if not line:
            raise RuntimeError("the router ended")
        found = re.search(r"Starting server on http://127.0.0.1:(\d+),", line)
    record = json.dumps({"role": "mixed", "host_ip": "127.0.0.1", "port": upstream}).encode()
    url = f"http://127.0.0.1:{found[1]}/register"
    request = urllib.request.Request(url, record, {"content-type": "application/json"})
    for _ in range(100):
        with suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200
            return int(found[1]), process.pid
        time.sleep(0.05)
    raise RuntimeError("the router does not take the server")


def _start_peer(stack: ExitStack, folder: Path, name: str, upstream: int, programs: Path | None) -> tuple[int, int]:
    """Port and process id of another proxy with its own way to be told of the server."""
    port = _free_port()
    conf = folder / f"{name}.conf"
    if name == "nginx":
        conf.write_text(NGINX_CONF.format(folder=folder, upstream=upstream, port=port))
        command = ["nginx", "-c", str(conf)]
    elif name == "haproxy":
        conf.write_text(HAPROXY_CONF.format(upstream=upstream, port=port))
        command = ["haproxy", "-f", str(conf)]
    else:
        assert programs is not None
        module, level = ("sglang_router", "warn") if name == "sglang-router" else ("vllm_router", "warning")
        command = [
            str(programs / "python"),
            "-m",
            f"{module}.launch_router",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--log-level", level]
        command += ["--prometheus-port", str(_free_port())]
    log = stack.enter_context((folder / f"{name}.log").open("w"))
    process = stack.enter_context(child(command, folder, stdout=log, stderr=log))
    for _ in range(400):
        with suppress(OSError), urllib.request.urlopen(_completion(port), timeout=10) as answer:
            if answer.status == 200:
                return port, process.pid
        time.sleep(0.05)
    raise RuntimeError(f"{name} does not answer: {(folder / f'{name}.log').read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _completion(port: int) -> urllib.request.Request:
    return urllib.request.Request(f"http://127.0.0.1:{port}{PATH}", BODY, {"content-type": "application/json"})


def _peers(programs: Path | None) -> list[str]:
    """The other proxies that are installed here."""
    found = [name for name in ("nginx", "haproxy") if shutil.which(name)]
    return found + (["sglang-router", "vllm-router"] if programs is not None else [])


class _Timed(Collected):
    """Keeps when its first bytes came, too."""

    first_s = 0.0

    def feed(self, data: bytes, read_s: float) -> None:
        """The next bytes."""
        self.first_s = self.first_s or read_s
        super().feed(data, read_s)


async def _load(port: int, body: bytes, concurrency: int, seconds: float) -> list[tuple[float, float]]:
    """Latencies of requests sent one after the other on each of the connections: to the end, to the first bytes; in
    seconds."""
    client = HttpClient(f"127.0.0.1:{port}", None, 60.0)
    latencies: list[tuple[float, float]] = []
    end_s = time.perf_counter() + seconds

    async def one() -> None:
        while (began_s := time.perf_counter()) < end_s:
            sink = _Timed()
            status, said = await client.post(PATH, body, sink)
            if status != 200:
                raise RuntimeError(f"port {port}: status {status}: {said!r}")
            _check(bytes(sink.data), body)
            latencies.append((time.perf_counter() - began_s, sink.first_s - began_s))

    async with client.watched():
        await asyncio.gather(*(one() for _ in range(concurrency)))
    return latencies


def _check(answer: bytes, body: bytes) -> None:
    """A proxy counts only for what it brought: every event, or the whole JSON. Raises RuntimeError."""
    whole = answer.count(b"data:") == N_EVENTS if body is STREAM_BODY else answer == ANSWER
    if not whole:
        raise RuntimeError(f"not the server's answer ({len(answer)} bytes): {answer[:300]!r}")


def measure_one(port: int, pid: int | None, concurrency: int, seconds: float) -> dict[str, float]:
    """One round of the three loads."""
    figures: dict[str, float] = {}
    loads = (("c1", BODY, 1, 1), ("json", BODY, concurrency, 1), ("events", STREAM_BODY, concurrency, N_EVENTS))
    for name, body, n_connections, n_each in loads:
        uvloop.run(_load(port, body, n_connections, 0.2))
        before_s, began_s = cpu_s(pid) if pid else 0.0, time.perf_counter()
        timed = uvloop.run(_load(port, body, n_connections, seconds))
        latencies, firsts = sorted(whole_s for whole_s, _ in timed), sorted(first_s for _, first_s in timed)
        took_s, used_s = time.perf_counter() - began_s, (cpu_s(pid) if pid else 0.0) - before_s
        n = len(latencies) * n_each
        figures[f"{name}_per_s"] = n / took_s
        figures[f"{name}_p50_ms"] = latencies[len(latencies) // 2] * 1e3
        figures[f"{name}_p99_ms"] = latencies[int(len(latencies) * 0.99)] * 1e3
        if n_each > 1:
            figures[f"{name}_first_p50_ms"] = firsts[len(firsts) // 2] * 1e3
            figures[f"{name}_first_p99_ms"] = firsts[int(len(firsts) * 0.99)] * 1e3
        if pid:
            figures[f"{name}_cpu_us"] = used_s / n * 1e6
    return figures


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """All rounds, their medians, and the ratios."""
    rounds: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, __file__, "--serve-upstream"]
        upstream = stack.enter_context(child(command, folder, stdout=subprocess.PIPE))
        assert upstream.stdout is not None
        port = int(upstream.stdout.readline())
        targets: dict[str, tuple[int, int | None]] = {DIRECT: (port, None)}
        targets[ROUTER] = _start_router(stack, folder, port, flags.policy)
        targets[WORKERS] = _start_router(stack, folder, port, flags.policy, 2)
        for name in _peers(flags.peer_programs):
            targets[name] = _start_peer(stack, folder, name, port, flags.peer_programs)
        for _ in range(flags.rounds):
            for name, (target_port, pid) in targets.items():
                figures = measure_one(target_port, pid, flags.concurrency, flags.seconds)
                rounds.setdefault(name, []).append(figures)
    medians = {name: {key: statistics.median(r[key] for r in of) for key in of[0]} for name, of in rounds.items()}
    return {"medians": _rounded(medians), "ratios": _rounded(_ratios(medians)), "rounds": _rounded(rounds)}


def _ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The router's figures over those of the others; latency it adds."""
    ours, ratios = medians[ROUTER], {}
    for name in sorted(medians.keys() - {ROUTER}):
        for key in ("json_per_s", "events_per_s", "json_p99_ms"):
            ratios[f"{key} of {name}"] = ours[key] / medians[name][key]
    ratios["added_ms_c1_p50"] = ours["c1_p50_ms"] - medians[DIRECT]["c1_p50_ms"]
    ratios["requests_per_s_per_core"] = 1e6 / ours["json_cpu_us"]
    ratios["events_per_s_per_core"] = 1e6 / ours["events_cpu_us"]
    return ratios


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="request_num", help="of the router (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="connections (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--peer-programs", type=Path, help="bin folder of a venv with sglang-router and vllm-router")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    parser.add_argument("--serve-upstream", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve_upstream:
        with suppress(KeyboardInterrupt):
            uvloop.run(_serve_upstream())
        return 0
    found = {
        "benchmark": "router_relay",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": own_versions(),
        "command": shown_command(sys.argv),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        **measure(flags),
    }
    text = json.dumps(found, indent=1, default=str)
    print(text)
    if flags.output:
        flags.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
