"""What the router costs: requests and stream events through it, against the same without it, on the same cores.

    python benchmarks/router_relay.py

One client, one made-up server and a proxy. Rounds with and without the router take turns, and with nginx and haproxy
too where they are installed (buffering off, kept connections), and with sglang-router and vllm-router from the
environment that --peer-programs names. Client and server cost little (light_http.py), and run in two arrangements:

- one core: every proxy has one core for itself, client and server have another;
- all cores: nothing is bound to a core; nginx, haproxy and the routers in Rust get as many threads as there are cores,
  and routers of ours run with 1 and with --workers processes.

Three loads, closed loop: one connection (latency), N connections with a small JSON answer, and N streams of 64 events
written one by one; of streams the first event is timed too. `cpu_us` is CPU time of the proxy's processes per request
or event. Ratios are taken within each round: median, least, most. Prints JSON.
"""

from __future__ import annotations

import argparse
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

import light_http
from light_http import BODY, N_EVENTS, PATH, STREAM_BODY
from machine import cpu_s, hardware
from report import own_versions, shown_command

DIRECT, ROUTER = "direct", "router"
ONE_CORE, ALL_CORES = "one core", "all cores"
HAPROXY_CONF = """
global
  maxconn 4096
  nbthread {threads}
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
daemon off; worker_processes {threads}; pid {folder}/pid; error_log {folder}/error.log;
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


def _serve_upstream() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        light_http.serve(listener)


@contextmanager
def child(
    command: Sequence[str], folder: Path, cores: Sequence[int] = (), **more: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the context; `cores` are those it may run on, if not all of this one's."""
    if cores:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    env = {**os.environ, "FD_LOG_DIR": str(folder / "log")}
    process = subprocess.Popen(command, text=True, env=env, **more)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def _start_router(
    stack: ExitStack, folder: Path, upstream: int, policy: str, workers: int, cores: Sequence[int]
) -> tuple[int, int]:
    """Port and process id of a router that knows the server."""
    command = [sys.executable, "-m", "fastdeploy.router.launch", "--host", "127.0.0.1", "--port", "0"]
    process = stack.enter_context(
        child([*command, "--policy", policy, "--workers", str(workers)], folder, cores, stderr=subprocess.PIPE)
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


def _start_peer(
    stack: ExitStack, folder: Path, name: str, upstream: int, programs: Path | None, cores: Sequence[int]
) -> tuple[int, int]:
    """Port and process id of another proxy with its own way to be told of the server."""
    port = _free_port()
    conf = folder / f"{name}.conf"
    if name == "nginx":
        conf.write_text(NGINX_CONF.format(threads=len(cores), folder=folder, upstream=upstream, port=port))
        command = ["nginx", "-c", str(conf)]
    elif name == "haproxy":
        conf.write_text(HAPROXY_CONF.format(threads=len(cores), upstream=upstream, port=port))
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
    process = stack.enter_context(child(command, folder, cores, stdout=log, stderr=log))
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


def measure_one(port: int, pid: int | None, concurrency: int, seconds: float) -> dict[str, float]:
    """One round of the three loads."""
    figures: dict[str, float] = {}
    loads = (("c1", BODY, 1, 1), ("json", BODY, concurrency, 1), ("events", STREAM_BODY, concurrency, N_EVENTS))
    for name, body, n_connections, n_each in loads:
        light_http.load(port, body, n_connections, 0.2)
        before_s, began_s = cpu_s(pid) if pid else 0.0, time.perf_counter()
        timed = light_http.load(port, body, n_connections, seconds)
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
    """Both arrangements: the rounds, their medians, and the ratios."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, Any] = {}
    if flags.arrangement in (ONE_CORE, "both"):
        if len(cores) < 2:
            raise SystemExit(f"{ONE_CORE} needs two cores")
        os.sched_setaffinity(0, cores[:1])
        names = [DIRECT, ROUTER, *_peers(flags.peer_programs)]
        found[ONE_CORE] = measure_all(flags, names, cores[1:2])
        os.sched_setaffinity(0, cores)
    if flags.arrangement in (ALL_CORES, "both"):
        workers = [f"{ROUTER}, {n} workers" for n in flags.workers if n > 1]
        found[ALL_CORES] = measure_all(flags, [DIRECT, ROUTER, *workers, *_peers(flags.peer_programs)], cores)
    return found


def measure_all(flags: argparse.Namespace, names: Sequence[str], cores: Sequence[int]) -> dict[str, Any]:
    """Rounds in which the named ones take turns; proxies run on `cores`, what this process starts else on its own."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, __file__, "--serve-upstream"]
        upstream = stack.enter_context(child(command, folder, stdout=subprocess.PIPE))
        assert upstream.stdout is not None
        port = int(upstream.stdout.readline())
        targets: dict[str, tuple[int, int | None]] = {}
        for name in names:
            if name == DIRECT:
                targets[name] = port, None
            elif name.startswith(ROUTER):
                n_workers = int(name.split()[1]) if name != ROUTER else 1
                targets[name] = _start_router(stack, folder, port, flags.policy, n_workers, cores)
            else:
                targets[name] = _start_peer(stack, folder, name, port, flags.peer_programs, cores)
        for _ in range(flags.rounds):
            for name, (target_port, pid) in targets.items():
                rounds[name].append(measure_one(target_port, pid, flags.concurrency, flags.seconds))
    medians = {name: {key: statistics.median(r[key] for r in of) for key in of[0]} for name, of in rounds.items()}
    return {"medians": _rounded(medians), "ratios": _rounded(_ratios(rounds)), "rounds": _rounded(rounds)}


def _ratios(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """The router's figures over those of the others: the median of the rounds, the least and the most."""
    ratios = {}
    for name in sorted(rounds.keys() - {ROUTER}):
        for key in ("json_per_s", "events_per_s", "json_p99_ms", "events_first_p50_ms", "json_cpu_us"):
            if key in rounds[name][0]:
                of = sorted(ours[key] / its[key] for ours, its in zip(rounds[ROUTER], rounds[name], strict=True))
                ratios[f"{key} of {name}"] = [statistics.median(of), of[0], of[-1]]
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
    parser.add_argument("--arrangement", choices=(ONE_CORE, ALL_CORES, "both"), default="both", help="see above")
    parser.add_argument("--workers", type=int, nargs="*", default=[2], help="of more routers (default: %(default)s)")
    parser.add_argument("--peer-programs", type=Path, help="bin folder of a venv with sglang-router and vllm-router")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    parser.add_argument("--serve-upstream", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve_upstream:
        with suppress(KeyboardInterrupt):
            _serve_upstream()
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
