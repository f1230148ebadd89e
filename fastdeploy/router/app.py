"""Every path of the router and what answers it. Forwarded ones go to `proxy`, the rest is answered here."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs

import msgspec

import fastdeploy
from fastdeploy.errors import InvalidRequest
from fastdeploy.observability.logs import RequestLogger
from fastdeploy.router.downstream import ClientConnection, Work
from fastdeploy.router.health import HealthChecker
from fastdeploy.router.http1 import Request, RequestHead, error_body, own_response
from fastdeploy.router.known_heads import KnownHeads
from fastdeploy.router.metrics import CONTENT_TYPE, Figures, RouterMetrics, added, rendered, shown
from fastdeploy.router.page import FILES
from fastdeploy.router.peers import Peers
from fastdeploy.router.proxy import Proxy
from fastdeploy.router.record import parse_record
from fastdeploy.router.registry import Registry, Server
from fastdeploy.router.upstream import Answer, UpstreamError, fetch

LOGGER = logging.getLogger(__name__)
ASK_ALL_TIMEOUT_S = 10.0

# Answers depend on the request alone, so any server may give them, and a second one may be asked.
FORWARDED: Mapping[bytes, bytes] = MappingProxyType(
    {
        b"/v1/chat/completions": b"POST",
        b"/v1/completions": b"POST",
        b"/v1/embeddings": b"POST",
        b"/v1/reward": b"POST",
        b"/v1/tokenize": b"POST",
        b"/v1/detokenize": b"POST",
        b"/tokenize": b"POST",
        b"/detokenize": b"POST",
    }
)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the router itself."""

    status: int
    body: bytes = b""
    content_type: bytes = b"application/json"


def _json(status: int, value: Any) -> Reply:
    return Reply(status, msgspec.json.encode(value))


def _code(status: int, text: str) -> Reply:
    """An answer of the registration endpoints: what routers before this one wrote, in both forms."""
    if status == 200:
        return _json(200, {"code": 200, "msg": text, "status": "success"})
    return _json(status, {"code": status, "msg": text, "detail": text})


class _Aborted(msgspec.Struct):
    aborted: list[Any] = []
    not_found: list[str] = []


class _AbortAnswer(msgspec.Struct):
    result: _Aborted | None = None


class _Models(msgspec.Struct):
    data: list[dict[str, Any]] = []


class _Answering:
    """The work for a request that the router answers by itself after some waiting."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def client_gone(self) -> None:
        """Nobody waits for the answer."""
        self._task.cancel()

    def client_full(self) -> None:
        """The answer is one short write."""

    def client_ready(self) -> None:
        """The answer is one short write."""


Answerer = Callable[[Request], Awaitable[Reply]]


class App:
    """A `Handler`: looks up the path of a request. `clients` are the open connections.

    `for_peers` is the handler of connections from other workers, which are told and asked what clients are not.
    """

    def __init__(
        self, registry: Registry, checker: HealthChecker, proxy: Proxy, metrics: RouterMetrics, peers: Peers
    ) -> None:
        self.clients: set[ClientConnection] = set()
        self.heads: KnownHeads[RequestHead] = KnownHeads(of_requests=True)
        self.for_peers = _ForPeers(self)
        self._peers = peers
        self._registry, self._checker, self._proxy, self._metrics = registry, checker, proxy, metrics
        self._routes: dict[bytes, tuple[frozenset[bytes], Answerer]] = {
            b"/health": (frozenset({b"GET", b"HEAD"}), self._health),
            b"/ping": (frozenset({b"GET", b"POST"}), self._health),
            b"/health_generate": (frozenset({b"GET"}), self._health_generate),
            b"/metrics": (frozenset({b"GET"}), self._metrics_page),
            b"/version": (frozenset({b"GET"}), self._version),
            b"/register": (frozenset({b"POST"}), self._register),
            b"/unregister": (frozenset({b"POST"}), self._unregister),
            b"/registered": (frozenset({b"GET"}), self._registered),
            b"/registered_number": (frozenset({b"GET"}), self._registered_number),
            b"/decode_instances": (frozenset({b"GET"}), self._decode_instances),
            b"/v1/models": (frozenset({b"GET"}), self._models),
            b"/v1/abort_requests": (frozenset({b"POST"}), self._abort_requests),
            b"/status": (frozenset({b"GET"}), self._status),
            **{path: (frozenset({b"GET"}), self._file) for path in FILES},
        }
        self._peer_routes: dict[bytes, Answerer] = {
            b"/register": self._register_here,
            b"/unregister": self._unregister_here,
            b"/figures": self._figures_here,
            b"/records": self._records_here,
        }

    def handle(self, request: Request, client: ClientConnection) -> Work | None:
        """Begin to answer."""
        path = request.head.path
        method = FORWARDED.get(path)
        if method == request.head.method:
            return self._proxy.forward(request, client)
        methods, answer = self._routes.get(path, (None, None))
        if answer is None or methods is None or request.head.method not in methods:
            status, text = 404, f"nothing at {_shown(path)}"
            if method is not None or answer is not None:
                status, text = 405, f"{_shown(path)} does not answer {_shown(request.head.method)}"
            self._reply(request, client, Reply(status, error_body(status, text)))
            return None
        return _Answering(asyncio.get_running_loop().create_task(self._answer(answer, request, client)))

    def handle_peer(self, request: Request, client: ClientConnection) -> Work | None:
        """Begin to answer another worker."""
        answer = self._peer_routes[request.head.path]
        return _Answering(asyncio.get_running_loop().create_task(self._answer(answer, request, client)))

    async def _answer(self, answer: Answerer, request: Request, client: ClientConnection) -> None:
        try:
            reply = await answer(request)
        except InvalidRequest as exc:
            reply = Reply(exc.status, error_body(exc.status, str(exc)))
        except Exception:
            RequestLogger(LOGGER, request.request_id.decode("latin-1")).exception(
                "%s failed", _shown(request.head.path)
            )
            reply = Reply(500, error_body(500, "internal error; the router's log tells more"))
        self._reply(request, client, reply)

    def _reply(self, request: Request, client: ClientConnection, reply: Reply) -> None:
        client.write(
            own_response(reply.status, reply.body, reply.content_type, request.request_id, close=not client.keep_alive)
        )
        head = request.head
        known = head.path in self._routes or head.path in FORWARDED
        took_s = self._checker.now_s() - request.received_s
        path = head.path if known else b"other"
        self._metrics.http(head.method, path, reply.status, took_s)
        client.finish()

    # ---- the router itself ---------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Reply:
        """The router is up; whether servers are is said by /health_generate and /registered_number."""
        return Reply(200 if self._proxy.closing is None else 503)

    async def _health_generate(self, request: Request) -> Reply:
        """Looks at all servers now."""
        await self._checker.check_all()
        n_well, n_all = len(self._registry.available), len(self._registry)
        return _json(200, {"code": 200, "msg": "Health check complete", "healthy": n_well, "unhealthy": n_all - n_well})

    async def _metrics_page(self, request: Request) -> Reply:
        return Reply(200, rendered(await self._figures()), CONTENT_TYPE)

    async def _status(self, request: Request) -> Reply:
        """What the page shows."""
        return _json(200, shown(await self._figures()))

    async def _file(self, request: Request) -> Reply:
        """A file of the page."""
        content_type, body = FILES[request.head.path]
        return Reply(200, body, content_type)

    async def _figures(self) -> Figures:
        """Those of all workers."""
        return added([self._metrics.figures(), *await self._peers.figures()])

    async def _figures_here(self, request: Request) -> Reply:
        return Reply(200, msgspec.msgpack.encode(self._metrics.figures()))

    async def _records_here(self, request: Request) -> Reply:
        records = [server.record for server in self._registry if not server.is_static]
        return Reply(200, msgspec.msgpack.encode(records))

    async def _version(self, request: Request) -> Reply:
        return _json(200, {"version": fastdeploy.__version__})

    # ---- servers -------------------------------------------------------------------------------------------------

    async def _register(self, request: Request) -> Reply:
        reply = await self._register_here(request)
        if reply.status == 200:
            await self._peers.tell(b"/register", request.body)
        return reply

    async def _register_here(self, request: Request) -> Reply:
        try:
            record = parse_record(request.body)
            self._registry.check_role(record)
        except InvalidRequest as exc:
            return _code(400, str(exc))
        if self._registry.heartbeat(record, self._checker.now_s()) is None:
            reason = await self._checker.admit(record)
            if reason is not None:
                LOGGER.warning("Failed to register instance: %s: %s", record.url, reason)
                return _code(503, f"{record.role} instance {record.url} service is not healthy: {reason}")
        return _code(200, "Register success")

    async def _unregister(self, request: Request) -> Reply:
        """Not in the routers before this one: a server that ends leaves at once instead of at a failed check."""
        reply = await self._unregister_here(request)
        if reply.status == 200:
            await self._peers.tell(b"/unregister", request.body)
        return reply

    async def _unregister_here(self, request: Request) -> Reply:
        try:
            record = parse_record(request.body)
        except InvalidRequest as exc:
            return _code(400, str(exc))
        server = self._registry.find(record.url)
        if server is not None and not server.is_static:
            self._registry.remove(server, "it said so")
        elif server is not None:
            self._registry.unwell(server, "it said so")
        return _code(200, "Unregister success")

    async def _registered(self, request: Request) -> Reply:
        shown: dict[str, Any] = {"code": 200, "msg": "success", "decode": [], "prefill": [], "mixed": []}
        for server in self._registry:
            shown[server.record.role].append(server.record.shown() | {"is_healthy": server.is_well})
        return _json(200, shown)

    async def _decode_instances(self, request: Request) -> Reply:
        """The decode servers as they registered, for prefill servers that connect ahead; `?version=` keeps one."""
        wanted = parse_qs(request.head.target.partition(b"?")[2].decode("latin-1")).get("version")
        servers = self._registry.available_without((), "decode")
        return _json(200, [one.record for one in servers if wanted is None or one.record.version == wanted[-1]])

    async def _registered_number(self, request: Request) -> Reply:
        return _json(200, self._registry.counts())

    # ---- asked of all servers ------------------------------------------------------------------------------------

    async def _ask_all(self, request: Request) -> list[Answer]:
        """What every server says; those that say nothing are left out."""

        async def ask(server: Server) -> Answer | None:
            headers = [one for one in request.head.headers if one[0] in (b"authorization", b"content-type")]
            headers.append((b"x-request-id", request.request_id))
            try:
                return await fetch(
                    server.upstream, request.head.method, request.head.target, ASK_ALL_TIMEOUT_S, headers, request.body
                )
            except UpstreamError as exc:
                LOGGER.warning("%s: %s: %s", server.url, _shown(request.head.path), exc)
                return None

        answers = await asyncio.gather(*(ask(server) for server in self._registry.available))
        return [answer for answer in answers if answer is not None]

    async def _models(self, request: Request) -> Reply:
        """The models of all servers, each once."""
        answers = await self._ask_all(request)
        good = [answer for answer in answers if answer.status == 200]
        if not good:
            return _refusal(answers)
        models: dict[str, dict[str, Any]] = {}
        for answer in good:
            for model in msgspec.json.decode(answer.body, type=_Models).data:
                models.setdefault(str(model.get("id")), model)
        return _json(200, {"object": "list", "data": list(models.values())})

    async def _abort_requests(self, request: Request) -> Reply:
        """Every server ends those of the requests that it has."""
        answers = await self._ask_all(request)
        good = [answer for answer in answers if answer.status == 200]
        if not good:
            return _refusal(answers)
        results = [msgspec.json.decode(answer.body, type=_AbortAnswer).result or _Aborted() for answer in good]
        aborted = [one for result in results for one in result.aborted]
        missing = [name for name in results[0].not_found if all(name in result.not_found for result in results)]
        result = {"aborted": aborted, "not_found": missing}
        return _json(
            200, {"request_id": f"control-{uuid.uuid4()}", "result": result, "status": "success", "error": None}
        )


class _ForPeers:
    """The `Handler` of other workers."""

    def __init__(self, app: App) -> None:
        self.clients: set[ClientConnection] = set()
        self.heads: KnownHeads[RequestHead] = KnownHeads(of_requests=True)
        self._app = app

    def handle(self, request: Request, client: ClientConnection) -> Work | None:
        """Begin to answer."""
        return self._app.handle_peer(request, client)


def _refusal(answers: list[Answer]) -> Reply:
    """What is said when no server gave what was asked for: the first one's own words, if there are any."""
    if not answers:
        return Reply(503, error_body(503, "No available workers"))
    return Reply(answers[0].status, answers[0].body)


def _shown(text: bytes) -> str:
    return ascii(text.decode("latin-1"))[1:-1][:200]
