"""Servers behind sglang-router, as its users have them. It is no package of ours: the test runs where it is installed,
or with the interpreter that FD_SGLANG_ROUTER_PYTHON names."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from processes import API_SERVER, READY, Process, wait_for

NAMED = os.environ.get("FD_SGLANG_ROUTER_PYTHON", "")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not NAMED and importlib.util.find_spec("sglang_router") is None, reason="no sglang-router here"),
]
N_REQUESTS, N_TOKENS = 8, 12


def test_two_servers_behind_it(tmp_path: Path) -> None:
    flags = [*API_SERVER, "--load-choices", "synthetic", "--synthetic-config", '{"step_ms": 2}', "--host", "127.0.0.1"]
    servers = [Process([*flags, "--port", "0"], tmp_path / name) for name in ("a", "b")]
    router: subprocess.Popen[bytes] | None = None
    log = tmp_path / "router.log"
    try:
        for server in servers:
            wait_for(lambda server=server: READY.search(server.console), what="a server")
        urls = [READY.findall(server.console)[0] for server in servers]
        port, prometheus_port = free_ports()
        where = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(prometheus_port)]
        command = [NAMED or sys.executable, "-m", "sglang_router.launch_router", *where, "--policy", "round_robin"]
        with log.open("wb") as sink:
            router = subprocess.Popen([*command, "--worker-urls", *urls], stdout=sink, stderr=sink)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_for(lambda: answers(client), what=f"the router: {log}")
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": N_TOKENS, "ignore_eos": True}
            model = client.get("/v1/models").json()["data"][0]["id"]
            for _ in range(N_REQUESTS):
                answer = client.post("/v1/chat/completions", json=body | {"model": model})
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] == N_TOKENS
                asked = body | {"model": model, "stream": True, "stream_options": {"include_usage": True}}
                with client.stream("POST", "/v1/chat/completions", json=asked) as stream:
                    lines = [line for line in stream.iter_lines() if line]
                assert stream.status_code == 200
                assert lines[-1] == "data: [DONE]"
                assert f'"completion_tokens":{N_TOKENS}' in lines[-2].replace(" ", "")
            refused = client.post("/v1/chat/completions", json={"model": model, "messages": "no"})
            assert refused.status_code == 400
        for url in urls:
            figures = httpx.get(f"{url}/metrics").text.splitlines()
            served = [
                float(line.split()[-1]) for line in figures if line.startswith("fastdeploy:request_success_total")
            ]
            assert sum(served) >= N_REQUESTS / 2, "round robin gives each server its half"
    finally:
        if router is not None:
            router.kill()
            router.wait()
        for server in servers:
            server.kill()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/models").status_code == 200
    except httpx.TransportError:
        return False


def free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
        return [one.getsockname()[1], other.getsockname()[1]]
