"""A stand-in for an api_server under supervision: announces itself, answers /health, and does what it is asked to.

Options, as `name=value` arguments: `fails=TEXT` ends it with that error before it is bound; `status=N` is its exit
status then; `drain_s=X` is what it takes to end after SIGTERM. GET /exit/N ends it with status N, GET /mute makes it
keep every connection without an answer, GET /unwell makes /health a 503, GET /crowd prints many lines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


def option(name: str, default: str = "") -> str:
    return next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith(f"{name}=")), default)


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    state: ClassVar[dict[str, Any]] = {"mute": False, "status": 200}

    def do_GET(self) -> None:
        if self.path.startswith("/exit/"):
            os._exit(int(self.path.removeprefix("/exit/")))
        if self.path == "/mute":
            self.state["mute"] = True
        if self.path == "/unwell":
            self.state["status"] = 503
        if self.path == "/crowd":
            for i in range(1000):
                print(f"line {i}", flush=True)
        if self.state["mute"]:
            time.sleep(3600)
        body = json.dumps({"error": {"message": "because"}}).encode()
        self.send_response(200 if self.path != "/health" else self.state["status"])
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def main() -> None:
    if option("fails"):
        print(f"fastdeploy: error: {option('fails')}", file=sys.stderr)
        sys.exit(int(option("status", "1")))
    servers = [ThreadingHTTPServer(("127.0.0.1", int(flag(name))), Handler) for name in ("--port", "--metrics-port")]
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = [server.server_address[1] for server in servers]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    bound = {"event": "bound", "url": urls[0], "metrics_url": urls[1], "port": ports[0], "metrics_port": ports[1]}
    print("ready", flush=True)
    with os.fdopen(int(os.environ["FD_ANNOUNCE_FD"]), "w") as pipe:
        for event in (bound, {"event": "ready"}):
            print(json.dumps(event), file=pipe, flush=True)
        stopped.wait()
        time.sleep(float(option("drain_s", "0")))


if __name__ == "__main__":
    main()
