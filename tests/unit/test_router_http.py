"""The router's HTTP/1.1 towards clients: framing, limits, and what it says to those that keep to neither."""

import asyncio
import json
from typing import Any

import pytest
from router_harness import Client, Running, Writer, running, until, whole

from fastdeploy.router.downstream import MAX_AHEAD
from fastdeploy.router.http1 import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    AnswerHead,
    Request,
    RequestHead,
    error_body,
)

pytestmark = pytest.mark.timeout(120)


async def echo(request: dict[str, Any], writer: Writer) -> None:
    writer.write(whole(request["body"] or b"-"))


async def slow_echo(request: dict[str, Any], writer: Writer) -> None:
    await asyncio.sleep(0.05)
    await echo(request, writer)


async def refused(run: Running, *pieces: bytes) -> int:
    """The status with which the router refuses what is written; the connection must end after it."""
    client = await run.client()
    for piece in pieces:
        client.writer.write(piece)
        await asyncio.sleep(0)
    status, headers, body = await client.answer()
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["message"]
    assert await client.is_closed()
    return status


def test_heads_are_limited() -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"

    async def main() -> None:
        async with running(echo) as (run, (server,)):
            assert await refused(run, start, b"a: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n") == 431
            assert await refused(run, start, b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n") == 431
            assert await refused(run, b"GET /" + b"x" * MAX_HEAD_BYTES * 2) == 431
            endless = [b"a: " + b"x" * 60000] * 8
            assert await refused(run, start, *endless) == 431
            assert server.n_asked == 0
            assert (await run.ask())[0] == 200
            run.check_idle()

    asyncio.run(main())


def test_bodies_are_limited() -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"

    async def main() -> None:
        async with running(echo) as (run, (server,)):
            assert await refused(run, start, b"content-length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)) == 413
            n_pieces = MAX_BODY_BYTES // 2**20 + 1
            pieces = [b"%x\r\n%s\r\n" % (2**20, b"x" * 2**20)] * n_pieces
            client = await run.client()
            client.writer.write(start + b"transfer-encoding: chunked\r\n\r\n")
            for piece in pieces:
                client.writer.write(piece)
            assert (await client.answer())[0] == 413
            assert server.n_asked == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    "text",
    [
        b"hello\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_not_http_is_refused(text: bytes) -> None:
    async def main() -> None:
        async with running(echo) as (run, (server,)):
            assert await refused(run, text) == 400
            assert server.n_asked == 0

    asyncio.run(main())


def test_a_request_in_many_pieces() -> None:
    async def main() -> None:
        async with running(echo) as (run, (server,)):
            client = await run.client()
            text = b"POST /v1/completions HTTP/1.1\r\nX-A: b\r\ntransfer-encoding: chunked\r\n\r\n"
            text += b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
            for i in range(len(text)):
                client.writer.write(text[i : i + 1])
                await asyncio.sleep(0.001)
            assert (await client.answer())[2] == b"abcde"
            (seen,) = server.requests
            assert (seen["headers"]["content-length"], seen["headers"]["x-a"]) == ("5", "b")
            assert "transfer-encoding" not in seen["headers"]

    asyncio.run(main())


def test_requests_sent_ahead_are_answered_in_order() -> None:
    async def main() -> None:
        async with running(slow_echo, echo) as (run, _):
            client = await run.client()
            for i in range(MAX_AHEAD):
                client.send(body=b"%d" % i)
            assert [(await client.answer())[2] for _ in range(MAX_AHEAD)] == [b"%d" % i for i in range(MAX_AHEAD)]
            for i in range(MAX_AHEAD + 8):
                client.send(body=b"%d" % i)
            await client.writer.drain()
            statuses = [(await client.answer())[0]]
            while statuses[-1] == 200:
                statuses.append((await client.answer())[0])
            assert statuses[-1] == 429
            assert await client.is_closed()
            await until(lambda: run.router.proxy.n_in_flight == 0)
            run.check_idle()

    asyncio.run(main())


def test_connections_are_kept_or_closed_as_the_client_wants() -> None:
    async def main() -> None:
        async with running(echo) as (run, _):
            client = await run.client()
            for _ in range(2):
                assert (await client.ask())[0] == 200
            _, headers, _ = await client.ask(extra="connection: close\r\n")
            assert headers["connection"] == "close"
            assert await client.is_closed()
            client = await run.client()
            client.writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            assert (await client.answer())[0] == 200
            assert await client.is_closed()

    asyncio.run(main())


def test_a_client_that_waits_for_permission_gets_it() -> None:
    async def main() -> None:
        async with running(echo) as (run, (server,)):
            client = await run.client()
            head = b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
            client.writer.write(head)
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.writer.write(b"ab")
            assert (await client.answer())[2] == b"ab"
            assert "expect" not in server.requests[0]["headers"]

    asyncio.run(main())


def test_an_offer_to_upgrade_is_not_taken_up() -> None:
    offer = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"

    async def main() -> None:
        async with running(echo) as (run, (server,)):
            client = await run.client()
            client.send(body=b"one", extra=offer)
            client.send(body=b"two", extra=offer)
            assert [(await client.answer())[2] for _ in range(2)] == [b"one", b"two"]
            assert not server.requests[0]["headers"].keys() & {"upgrade", "connection", "http2-settings"}
            assert (await client.ask("GET", b"/health", b"", extra=offer))[0] == 200

    asyncio.run(main())


def test_unknown_paths_and_methods() -> None:
    async def main() -> None:
        async with running(echo) as (run, (server,)):
            assert (await run.ask("GET", b"/v1/nothing", b""))[0] == 404
            assert (await run.ask("GET", b"/v1/completions", b""))[0] == 405
            assert (await run.ask("POST", b"/registered", b"{}"))[0] == 405
            assert (await run.ask("POST", b"/v1/pause", b"{}"))[0] == 404
            assert (await run.ask("POST", b"/v1/tokenize", b"{}"))[0] == 200
            assert server.n_asked == 1
            page = (await run.ask("GET", b"/metrics", b""))[2].decode()
            assert 'http_requests_total{endpoint="other",method="GET",status_code="404"} 1.0' in page
            assert 'quantile="0.99"' in page
            url = f"http://127.0.0.1:{server.port}"
            labels = f'decode_worker="",mixed_worker="{url}",prefill_worker="",status_code="200"'
            assert f"inference_requests_total{{{labels}}} 1.0" in page
            assert f'router_server_available{{server="{url}"}} 1.0' in page

    asyncio.run(main())


def test_clients_that_say_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy.router.server.SWEEP_S", 0.02)
    monkeypatch.setattr("fastdeploy.router.downstream.IDLE_TIMEOUT_S", 0.1)
    monkeypatch.setattr("fastdeploy.router.downstream.RECEIVE_TIMEOUT_S", 0.2)

    async def half(client: Client) -> None:
        client.writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\n\r\nab")
        assert (await client.answer())[0] == 408

    async def main() -> None:
        async with running(echo) as (run, _):
            assert await (await run.client()).is_closed()
            await half(await run.client())
            await until(lambda: not run.router.app.clients)

    asyncio.run(main())


def test_heads_that_the_router_writes() -> None:
    answer = AnswerHead.of(299, [(b"connection", b"x-a"), (b"x-a", b"1"), (b"x-b", b"2")])
    assert answer.written(b"", b"me") == b"HTTP/1.1 299 Status\r\nx-b: 2\r\nx-request-id: me\r\n\r\n"
    head = RequestHead.of(b"GET", b"/a?b", [(b"host", b"c"), (b"x-b", b"2")], False, True)
    request = Request(head, b"", b"me", 0.0)
    assert request.forwarded(b"h:1") == b"GET /a?b HTTP/1.1\r\nhost: h:1\r\nx-request-id: me\r\nx-b: 2\r\n\r\n"
    assert json.loads(error_body(502, "no"))["error"] == {
        "message": "no",
        "type": "api_connection_error",
        "param": None,
        "code": "connection_error",
    }
