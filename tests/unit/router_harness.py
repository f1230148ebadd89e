"""A router and made-up servers in one event loop: a server is a function that writes whatever it likes."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import zip_longest
from typing import Any

import pytest

from fastdeploy.entrypoints.openai.server import bind
from fastdeploy.router.config import RouterConfig, ServerSettings
from fastdeploy.router.health import ManagerSettings
from fastdeploy.router.placement import PairSettings
from fastdeploy.router.policies import SchedulerSettings
from fastdeploy.router.server import Router

PATIENCE_S = 20.0
COMPLETE = b"/v1/completions"
BODY = b'{"prompt": "hello", "stream": true}'

Writer = asyncio.StreamWriter
Script = Callable[[dict[str, Any], Writer], Awaitable[None]]


def whole(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    """An answer with its length."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def piece(data: bytes) -> bytes:
    """A chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class FakeServer:
    """Answers /health with `health`, everything else by `script`, and keeps the requests it saw."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.health = 200
        self.requests: list[dict[str, Any]] = []
        self.n_connections = 0
        self.n_gone = 0  # connections that the router cut while an answer was written
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As if killed."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.sleep(0)

    @property
    def n_asked(self) -> int:
        """Requests besides health checks."""
        return len(self.requests)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        try:
            while request := await read_message(reader):
                if request["target"] == "/health":
                    writer.write(whole(b"", f"{self.health} X"))
                    continue
                self.requests.append(request)
                watch = asyncio.ensure_future(self.script(request, writer))
                gone = asyncio.ensure_future(reader.read(1))
                try:
                    await asyncio.wait([watch, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not watch.done():
                        self.n_gone += 1
                        break
                finally:
                    watch.cancel()
                    gone.cancel()
                    await asyncio.gather(watch, gone, return_exceptions=True)
                if writer.is_closing():
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()


async def read_message(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """A request: method, target, headers, body."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, target, _ = first.split(" ")
    return {"method": method, "target": target, "headers": headers, "body": body}


class Client:
    """One raw connection to the router."""

    def __init__(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.reader, self.writer = reader, writer

    def send(self, method: str = "POST", target: bytes = COMPLETE, body: bytes = BODY, extra: str = "") -> None:
        head = f"{method} {target.decode()} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        self.writer.write(head.encode() + body)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. Raises IncompleteReadError when the connection ends before the answer does."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
            if headers.get("transfer-encoding") == "chunked":
                pieces = []
                while n := int(await self.reader.readline(), 16):
                    pieces.append(await self.reader.readexactly(n))
                    await self.reader.readexactly(2)
                body = b"".join(pieces)
                await self.reader.readexactly(2)
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
            return int(first.split(" ")[1]), headers, body

    async def ask(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
        self.send(*args, **kwargs)
        return await self.answer()

    async def is_closed(self) -> bool:
        """Whether the router closes the connection without another byte."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read(1) == b""


class Running:
    """A router that listens, with its clients."""

    def __init__(self, router: Router, port: int) -> None:
        self.router, self.port = router, port
        self._clients: list[Client] = []

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def ask(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
        """A request on a connection of its own."""
        client = await self.client()
        try:
            return await client.ask(*args, **kwargs)
        finally:
            client.writer.close()

    async def register(self, server: FakeServer, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = {"role": "mixed", "host_ip": "127.0.0.1", "port": server.port, **fields}
        status, _, answer = await self.ask(target=b"/register", body=json.dumps(body).encode())
        return status, json.loads(answer)

    def check_idle(self) -> None:
        """Nothing is in flight, and the ledger is at zero."""
        assert not self.router.proxy.legs
        assert self.router.proxy.n_in_flight == 0
        for server in self.router.registry:
            assert (server.load.n_requests, server.load.n_waiting, server.load.n_tokens) == (0, 0, 0)

    def close(self) -> None:
        for client in self._clients:
            client.writer.transport.abort()


@asynccontextmanager
async def running(
    *scripts: Script,
    policy: str = "round_robin",
    timeout_s: float = PATIENCE_S,
    roles: Sequence[str] = (),
    pairs: PairSettings | None = None,
    **manager: Any,
) -> AsyncIterator[tuple[Running, list[FakeServer]]]:
    """A router in front of one registered server per script, in the order of their URLs; `roles` for pairs."""
    servers = [FakeServer(script) for script in scripts]
    for server in servers:
        await server.start()
    servers.sort(key=lambda server: f"http://127.0.0.1:{server.port}")
    for server, script in zip(servers, scripts, strict=True):
        server.script = script
    config = RouterConfig(
        server=ServerSettings(splitwise=bool(roles)),
        scheduler=SchedulerSettings(policy=policy, prefill_policy=policy, decode_policy=policy),
        pairs=pairs or PairSettings(),
        manager=ManagerSettings(**manager),
        request_timeout_s=timeout_s,
    )
    router = Router.build(config)
    with bind("127.0.0.1", 0, "--port") as sock:
        async with router.listening(sock):
            run = Running(router, sock.getsockname()[1])
            for server, role in zip_longest(servers, roles, fillvalue="mixed"):
                fields = {"connector_port": 7000, "transfer_protocol": ["ipc", "rdma"]} if roles else {}
                assert (await run.register(server, role=role, **fields))[0] == 200
            try:
                yield run, servers
            finally:
                run.close()
                for server in servers:
                    await server.stop()


async def until(holds: Callable[[], Any], what: str = "") -> None:
    """Waits for something that should take a moment."""
    for _ in range(int(PATIENCE_S / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"never came: {what or holds}")
