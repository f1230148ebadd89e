"""`docs/nginx.conf` as it stands, but for its ports, in front of two synthetic servers."""

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from processes import API_SERVER, PATIENCE_S, READY, Process, Stream, wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(NGINX is None, reason="no nginx here (Debian: apt install nginx-light)"),
]

CONF = Path(__file__).parents[2] / "docs" / "nginx.conf"
STEP_S = 0.05
PACE = f'{{"step_ms": {STEP_S * 1e3}}}'
# What /etc/nginx/nginx.conf has around a file of conf.d, without the paths that only root may write.
AROUND = """
daemon off; worker_processes 2; pid {folder}/pid;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/fastdeploy.conf;
}}
"""


class Servers:
    """Two synthetic servers and nginx before them."""

    def __init__(self, folder: Path) -> None:
        flags = [*API_SERVER, "--load-choices", "synthetic", "--synthetic-config", PACE, "--host", "127.0.0.1"]
        self.servers = [Process([*flags, "--port", "0"], folder / name) for name in ("a", "b")]
        self.nginx: subprocess.Popen[bytes] | None = None
        self.url = ""
        self._folder = folder

    def start(self) -> None:
        """Until nginx and both servers answer."""
        for server in self.servers:
            wait_for(lambda server=server: READY.search(server.console), what="a server")
            server.tree()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        conf = CONF.read_text()
        ours = (f"listen 127.0.0.1:{port};", *(f"server {url.removeprefix('http://')} " for url in self.urls))
        for theirs, new in zip(("listen 8000;", "server 127.0.0.1:8180 ", "server 127.0.0.1:8182 "), ours, strict=True):
            assert conf.count(theirs) == 1, theirs
            conf = conf.replace(theirs, new)
        (self._folder / "fastdeploy.conf").write_text(conf)
        (self._folder / "nginx.conf").write_text(AROUND.format(folder=self._folder))
        assert NGINX is not None
        with (self._folder / "nginx.out").open("wb") as sink:
            command = [NGINX, "-e", "stderr", "-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]
            self.nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        self.url = f"http://127.0.0.1:{port}"
        wait_for(self._answers, what="nginx")

    @property
    def urls(self) -> list[str]:
        """Of the servers themselves."""
        return [READY.findall(server.console)[0] for server in self.servers]

    def _answers(self) -> bool:
        assert self.nginx is not None and self.nginx.poll() is None, (self._folder / "nginx.out").read_text()
        try:
            return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code == 200
        except httpx.TransportError:
            return False

    def n_running(self) -> list[int]:
        """Requests that each server has."""
        pages = [httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text for url in self.urls]
        found = [re.search(r"^fastdeploy:num_requests_running (\S+)$", page, re.MULTILINE) for page in pages]
        return [int(float(one[1])) for one in found if one]

    def end(self) -> None:
        """All of them."""
        if self.nginx is not None:
            self.nginx.send_signal(signal.SIGTERM)
            self.nginx.wait(PATIENCE_S)
        for server in self.servers:
            server.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("nginx"))
    try:
        servers.start()
        yield servers
    finally:
        servers.end()


def complete(fleet: Servers, **body: object) -> httpx.Response:
    wanted = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True, **body}
    headers = {"x-request-id": "mine"}
    return httpx.post(f"{fleet.url}/v1/completions", json=wanted, headers=headers, timeout=PATIENCE_S)


def test_whole_answers_are_those_of_the_servers(fleet: Servers) -> None:
    """Through the kept connections too, with their ids, statuses and errors; the rest is not reached."""
    texts = set()
    for _ in range(6):
        answer = complete(fleet)
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
        texts.add(answer.json()["choices"][0]["text"])
    direct = httpx.post(
        f"{fleet.urls[0]}/v1/completions", json={"prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    )
    assert texts == {direct.json()["choices"][0]["text"]}
    wrong = complete(fleet, n="x")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n")
    assert httpx.get(f"{fleet.url}/metrics", timeout=PATIENCE_S).status_code == 404


def test_events_come_one_by_one(fleet: Servers) -> None:
    """A step of the server takes much longer than an event on its way, so that events together were held back."""
    n_tokens = 20
    body = {"prompt": "hello", "max_tokens": n_tokens, "ignore_eos": True, "stream": True}
    arrivals_s, text = [], ""
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        for piece in answer.iter_text():
            arrivals_s.append(time.monotonic())
            text += piece
    assert text.endswith("data: [DONE]\n\n")
    assert len(arrivals_s) > n_tokens / 2
    # Half of the time that the server itself takes: an answer that is held back comes all at once.
    assert arrivals_s[-1] - arrivals_s[0] > n_tokens * STEP_S / 2


def test_the_server_with_fewer_requests_is_asked(fleet: Servers) -> None:
    streams = [Stream(fleet.url, max_tokens=1500) for _ in range(6)]
    assert all(stream.began.wait(PATIENCE_S) for stream in streams)
    wait_for(lambda: fleet.n_running() == [3, 3], what="three requests at each")
    for url in fleet.urls:
        httpx.post(f"{url}/v1/abort_requests", json={"abort_all": True}, timeout=PATIENCE_S)
    for stream in streams:
        stream.join(PATIENCE_S)
        assert not stream.failed


def test_a_client_that_leaves_frees_its_server(fleet: Servers) -> None:
    body = {"prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        pieces = answer.iter_bytes()  # held: the connection is closed with it
        next(pieces)
        wait_for(lambda: sum(fleet.n_running()) == 1, what="one running request")
    wait_for(lambda: sum(fleet.n_running()) == 0, what="free servers")


def test_a_dead_server_is_gone_round(fleet: Servers) -> None:
    """Killed with requests that wait for their whole answer, which the client then gets from the other server; the
    health of the whole stays good."""
    waiting = [Stream(fleet.url, stream=False, max_tokens=40) for _ in range(6)]
    wait_for(lambda: fleet.n_running() == [3, 3], what="requests at both")
    fleet.servers[1].kill()
    for stream in waiting:
        stream.join(PATIENCE_S)
        assert not stream.failed, stream.text
        assert '"finish_reason":"length"' in stream.text.replace(" ", "")
    assert [complete(fleet).status_code for _ in range(10)] == [200] * 10
    assert httpx.get(f"{fleet.url}/health", timeout=PATIENCE_S).status_code == 200
