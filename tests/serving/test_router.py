"""The router as a process in front of two real servers: answers, spread, deaths, restarts, clients that leave."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from processes import PATIENCE_S, Process, Server, Stream, wait_for

from fastdeploy.router.registration import keep_registered, router_addresses

pytestmark = pytest.mark.timeout(240)

N_SLOTS = 2  # of each server
FLAGS = ("--max-num-seqs", str(N_SLOTS), "--max-model-len", "4096")
HEARTBEAT_S = 0.5


class RouterProcess(Process):
    """`python -m fastdeploy.router.launch` that listens."""

    def __init__(self, folder: Path, port: int = 0, *flags: str) -> None:
        super().__init__(("-m", "fastdeploy.router.launch", "--host", "127.0.0.1", "--port", str(port), *flags), folder)
        found = wait_for(lambda: re.search(r"Starting server on (http://\S+),", self.console), what="the router")
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])

    def n_servers(self) -> int:
        answer = httpx.get(f"{self.url}/registered_number", timeout=PATIENCE_S)
        return int(answer.json()["mixed"])


class Registrations:
    """What servers started with `--router` do, for servers of this test: one thread, one coroutine for each."""

    def __init__(self, servers: Sequence[Server], router: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(servers, router), daemon=True)
        self._thread.start()

    def _run(self, servers: Sequence[Server], router: str) -> None:
        async def keep() -> None:
            async with asyncio.TaskGroup() as group:
                for server in servers:
                    group.create_task(self._keep(server, router))

        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(keep())
        with pytest.raises(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _keep(self, server: Server, router: str) -> None:
        port = int(server.url.rpartition(":")[2])
        addresses = router_addresses(router)
        await keep_registered(
            addresses, "0.0.0.0", port, port, lambda: server.popen.poll() is None, interval_s=HEARTBEAT_S
        )

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


class Fleet:
    """A router and two servers that register with it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.router = RouterProcess(folder / "router")
        self.servers = [Server(model, folder / name, *FLAGS) for name in ("a", "b")]
        self._n_restarts = 0

    def start(self) -> None:
        for server in self.servers:
            server.wait_ready()
            server.tree()
        self.registrations = Registrations(self.servers, f"0.0.0.0:{self.router.port}")
        self.wait_for_servers(2)

    def wait_for_servers(self, n: int) -> None:
        wait_for(lambda: self.router.n_servers() == n, what=f"{n} registered servers")

    def folder_for_restart(self) -> Path:
        self._n_restarts += 1
        return self.folder / f"restart-{self._n_restarts}"

    def running(self) -> list[int]:
        return [int(server.metric("num_requests_running")) for server in self.servers]

    def enqueued(self) -> list[int]:
        return [int(server.metric("num_requests_enqueued")) for server in self.servers]

    def end(self) -> None:
        for process in (self.router, *self.servers):
            process.kill()


@pytest.fixture(scope="module")
def fleet(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An answer of its whole length takes much longer than any test looks at it."""
    model = tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=4096, num_hidden_layers=8)
    fleet = Fleet(model, tmp_path_factory.mktemp("router"))
    try:
        fleet.start()
        yield fleet
        fleet.registrations.end()
        fleet.wait_for_servers(0)
        fleet.router.popen.terminate()
        assert fleet.router.end() == 0
        fleet.router.check_nothing_left()
    finally:
        fleet.end()


def test_answers_are_those_of_the_servers(fleet: Fleet) -> None:
    chat = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    plain = {"prompt": [5, 7, 9], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", plain)):
        answers = []
        for url in (fleet.router.url, fleet.servers[0].url, fleet.router.url):
            answer = httpx.post(f"{url}{path}", json=body, headers={"x-request-id": "mine"}, timeout=PATIENCE_S)
            assert answer.status_code == 200
            assert answer.headers["x-request-id"] == "mine"
            answers.append(answer.json()["choices"])
        assert answers[0] == answers[1] == answers[2]
        stream = httpx.post(f"{fleet.router.url}{path}", json={**body, "stream": True}, timeout=PATIENCE_S)
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.text.endswith("data: [DONE]\n\n")
    wrong = httpx.post(f"{fleet.router.url}/v1/completions", json={"prompt": "a", "n": "x"}, timeout=PATIENCE_S)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n"), "errors are the server's own"
    models = httpx.get(f"{fleet.router.url}/v1/models", timeout=PATIENCE_S).json()["data"]
    assert len(models) == 1
    tokens = httpx.post(f"{fleet.router.url}/v1/tokenize", json={"prompt": "the"}, timeout=PATIENCE_S).json()
    assert tokens["count"]


def test_requests_spread_and_a_client_that_leaves_frees_its_engine(fleet: Fleet) -> None:
    with httpx.Client(timeout=PATIENCE_S) as client:
        body = {"prompt": "once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        request = client.build_request("POST", f"{fleet.router.url}/v1/completions", json=body)
        answers = [client.send(request, stream=True) for _ in range(2 * N_SLOTS)]
        wait_for(lambda: fleet.running() == [N_SLOTS, N_SLOTS], what="an even spread")
        for answer in answers:
            answer.close()
        wait_for(lambda: fleet.enqueued() == [0, 0], what="free engines")


def test_requests_are_aborted_wherever_they_are(fleet: Fleet) -> None:
    streams = [Stream(fleet.router.url, request_id=f"abort-{i}") for i in range(4)]
    assert all(stream.began.wait(PATIENCE_S) for stream in streams)
    names = [*(f"cmpl-abort-{i}" for i in range(4)), "nobody"]
    answer = httpx.post(f"{fleet.router.url}/v1/abort_requests", json={"req_ids": names}, timeout=PATIENCE_S).json()
    assert sorted(one["request_id"] for one in answer["result"]["aborted"]) == names[:4]
    assert answer["result"]["not_found"] == ["nobody"]
    for stream in streams:
        stream.join(PATIENCE_S)
        assert stream.text.endswith("data: [DONE]\n\n")


def test_a_killed_server(fleet: Fleet) -> None:
    """Both servers are full and hold waiting requests when one dies."""
    running = [Stream(fleet.router.url) for _ in range(2 * N_SLOTS)]
    assert all(stream.began.wait(PATIENCE_S) for stream in running)
    waiting = [Stream(fleet.router.url, max_tokens=4) for _ in range(4)]
    wait_for(lambda: fleet.enqueued() == [N_SLOTS + 2, N_SLOTS + 2], what="waiting requests on both")
    dead, alive = fleet.servers
    dead.popen.kill()
    dead.end()
    wait_for(lambda: sum(not stream.is_alive() for stream in running) == N_SLOTS, what="the end of its streams")
    for stream in running:
        if not stream.is_alive():
            assert '"type":"api_connection_error"' in stream.text, "a stream was cut without a word"
            assert stream.text.endswith("data: [DONE]\n\n")
            assert stream.ended == "done"
    fleet.wait_for_servers(1)
    wait_for(lambda: alive.metric("num_requests_enqueued") == N_SLOTS + 4, what="its waiting requests to move")
    everything = httpx.post(f"{alive.url}/v1/abort_requests", json={"abort_all": True}, timeout=PATIENCE_S).json()
    assert len(everything["result"]["aborted"]) == N_SLOTS + 4
    for stream in (*running, *waiting):
        stream.join(PATIENCE_S)
    assert not any(stream.failed for stream in waiting), "a request that got no byte was lost"
    wait_for(lambda: not dead.alive(), what="the end of its other processes")
    answers = [Stream(fleet.router.url, max_tokens=2) for _ in range(4)]
    for stream in answers:
        stream.join(PATIENCE_S)
        assert not stream.failed
    back = Server(fleet.model, fleet.folder_for_restart(), *FLAGS, "--port", dead.url.rpartition(":")[2])
    fleet.servers[0] = back
    fleet.registrations.end()
    back.wait_ready()
    fleet.registrations = Registrations(fleet.servers, f"0.0.0.0:{fleet.router.port}")
    fleet.wait_for_servers(2)
    assert {fleet_answer(fleet) for _ in range(2)} == {200}


def fleet_answer(fleet: Fleet) -> int:
    """Status of a short request through the router."""
    body = {"prompt": "the", "max_tokens": 2}
    return httpx.post(f"{fleet.router.url}/v1/completions", json=body, timeout=PATIENCE_S).status_code


def test_a_router_that_is_restarted_gets_its_servers_back(fleet: Fleet) -> None:
    fleet.router.popen.kill()
    fleet.router.end()
    fleet.router = RouterProcess(fleet.folder_for_restart(), fleet.router.port)
    fleet.wait_for_servers(2)
    assert fleet_answer(fleet) == 200


def test_the_log_file_of_the_router(fleet: Fleet) -> None:
    log = (fleet.router.folder / "log" / "router.log").read_text()
    assert "registered mixed instance" in log


def test_a_router_ends_in_order_with_a_request_running(fleet: Fleet, tmp_path: Path) -> None:
    port = fleet.servers[0].url.rpartition(":")[2]
    listed, config = tmp_path / "servers.yaml", tmp_path / "router.yaml"
    listed.write_text(f"instances:\n- {{role: mixed, host_ip: 127.0.0.1, port: {port}}}\n")
    config.write_text(f"manager: {{register-path: {listed}}}\nscheduler: {{policy: fd_remote_metrics_score}}\n")
    router = RouterProcess(tmp_path / "run", 0, "--config_path", str(config))
    try:
        wait_for(lambda: "well again" in router.console, what="a listed server")
        stream = Stream(router.url, max_tokens=200)
        assert stream.began.wait(PATIENCE_S)
        router.popen.terminate()
        assert router.end() == 0
        stream.join(PATIENCE_S)
        assert stream.text.endswith("data: [DONE]\n\n")
        assert not stream.failed
        router.check_nothing_left()
    finally:
        router.kill()
