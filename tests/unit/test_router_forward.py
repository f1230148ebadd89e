"""What the router does with the bytes of answers, and with servers and clients that fail at every moment."""

import asyncio
import json
from typing import Any

import pytest
from router_harness import BODY, LAST, SSE_HEAD, Script, Writer, piece, running, until, whole

pytestmark = pytest.mark.timeout(120)

Request = dict[str, Any]


def says(text: str, n_bytes: int = 0) -> Script:
    async def script(request: Request, writer: Writer) -> None:
        writer.write(whole(json.dumps({"from": text, "pad": "x" * n_bytes}).encode(), extra="x-mine: 1\r\n"))

    return script


async def dies(request: Request, writer: Writer) -> None:
    writer.transport.abort()


async def stalls(request: Request, writer: Writer) -> None:
    await asyncio.sleep(3600)


def streams(*parts: bytes, ends: bool = True, gap_s: float = 0.0) -> Script:
    """Writes the parts as chunks and ends, or dies."""

    async def script(request: Request, writer: Writer) -> None:
        writer.write(SSE_HEAD)
        for part in parts:
            writer.write(piece(part))
            await writer.drain()
            await asyncio.sleep(gap_s)
        if ends:
            writer.write(LAST)
        else:
            await asyncio.sleep(0.05)  # what was written must arrive before the reset
            writer.transport.abort()

    return script


def refuses(status: str) -> Script:
    async def script(request: Request, writer: Writer) -> None:
        writer.write(whole(b'{"error": "no"}', status))

    return script


EVENTS = (b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n")


def test_a_request_and_its_answer_pass_through() -> None:
    async def main() -> None:
        async with running(says("a")) as (run, (server,)):
            extra = "Authorization: Bearer k\r\nX-Request-Id: me\r\nConnection: x-hop\r\nX-Hop: 1\r\nTE: x\r\n"
            client = await run.client()
            status, headers, body = await client.ask(target=b"/v1/completions?a=1", extra=extra)
            assert (status, json.loads(body)["from"]) == (200, "a")
            assert headers["x-mine"] == "1"
            assert headers["x-request-id"] == "me"
            (seen,) = server.requests
            assert (seen["method"], seen["target"], seen["body"]) == ("POST", "/v1/completions?a=1", BODY)
            assert seen["headers"]["authorization"] == "Bearer k"
            assert seen["headers"]["x-request-id"] == "me"
            assert seen["headers"]["host"] == f"127.0.0.1:{server.port}"
            assert not seen["headers"].keys() & {"te", "x-hop", "connection"}
            n_connections = server.n_connections
            await client.ask(extra="Transfer-Encoding: chunked\r\n".replace("Transfer", "X-Transfer"))
            assert server.n_connections == n_connections, "the connection to the server was not kept"
            assert server.requests[1]["headers"]["x-request-id"] != "me"
            run.check_idle()

    asyncio.run(main())


def test_events_are_passed_on_whole_and_in_order() -> None:
    cut = (b'data: {"n": 1}\n\ndata: {"n"', b": 2}\n", b"\ndata: [DONE]\n\n")

    async def main() -> None:
        async with running(streams(*cut, gap_s=0.02)) as (run, _):
            client = await run.client()
            client.send()
            await client.reader.readuntil(b"\r\n\r\n")
            n = int(await client.reader.readline(), 16)
            assert await client.reader.readexactly(n) == EVENTS[0], "a part of an event is of no use to the client"
            status, _, body = await (await run.client()).ask()
            assert (status, body) == (200, b"".join(EVENTS))
            await until(lambda: run.router.proxy.n_in_flight == 0)
            run.check_idle()
            (server,) = run.router.registry
            assert server.load.n_events_total == 6

    asyncio.run(main())


@pytest.mark.parametrize("bad", [dies, refuses("503 X"), refuses("429 X"), streams(ends=False)])
def test_another_server_is_tried_before_the_first_byte(bad: Script) -> None:
    async def main() -> None:
        async with running(bad, says("good")) as (run, servers):
            for _ in range(4):
                status, _, body = await run.ask()
                assert (status, json.loads(body)["from"]) == (200, "good")
            assert servers[0].n_asked
            assert servers[1].n_asked == 4, "a request was given twice to one server"
            run.check_idle()

    asyncio.run(main())


def test_a_server_that_fails_all_requests_gets_fewer_and_fewer() -> None:
    async def main() -> None:
        async with running(dies, says("good")) as (run, (bad, good)):
            for _ in range(40):
                assert (await run.ask())[0] == 200
                await asyncio.sleep(0.01)
            assert good.n_asked == 40
            assert 2 <= bad.n_asked <= 8, "half of the requests, without a pause after every failure"
            run.check_idle()

    asyncio.run(main())


def test_a_held_answer_that_breaks_off_is_asked_for_again() -> None:
    async def breaks_off(request: Request, writer: Writer) -> None:
        writer.write(whole(b"x" * 100)[:-50])
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def main() -> None:
        async with running(breaks_off, says("good")) as (run, _):
            assert json.loads((await run.ask())[2])["from"] == "good"

    asyncio.run(main())


def test_when_nobody_answers() -> None:
    async def main() -> None:
        async with running(dies, dies) as (run, _):
            status, headers, body = await run.ask(extra="x-request-id: me\r\n")
            assert (status, headers["x-request-id"]) == (502, "me")
            assert "Failed to connect to backend service" in json.loads(body)["error"]["message"]
        async with running() as (run, _):
            status, headers, body = await run.ask()
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(body)["error"]["message"] == "No available workers"
        async with running(refuses("429 X"), refuses("503 X")) as (run, _):
            assert (await run.ask())[0] in (429, 503), "the last refusal is the server's own"
            run.check_idle()

    asyncio.run(main())


def test_a_server_that_is_down_gets_nothing_and_comes_back() -> None:
    async def main() -> None:
        async with running(says("a"), says("b"), health_check_interval_secs=0.05) as (run, (a, b)):
            await a.stop()
            for _ in range(4):
                assert json.loads((await run.ask())[2])["from"] == "b"
            await until(lambda: len(run.router.registry) == 1, "its removal")
            assert (await run.register(a))[0] == 503
            await a.start(a.port)
            assert (await run.register(a))[0] == 200
            seen = {json.loads((await run.ask())[2])["from"] for _ in range(4)}
            assert seen == {"a", "b"}
            b.health = 503
            await until(lambda: len(run.router.registry) == 1, "its removal")

    asyncio.run(main())


def test_a_stream_that_dies_ends_with_an_error_event() -> None:
    dying = streams(EVENTS[0], b'data: {"n": 2', ends=False, gap_s=0.05)

    async def main() -> None:
        async with running(dying, says("good")) as (run, _):
            client = await run.client()
            status, _, body = await client.ask()
            assert status == 200
            first, error, done, rest = body.split(b"\n\n")
            assert (first + b"\n\n", done, rest) == (EVENTS[0], b"data: [DONE]", b"")
            fields = json.loads(error.removeprefix(b"data: "))["error"]
            assert "closed the connection" in fields["message"]
            assert fields["type"] == "api_connection_error"
            assert (await client.ask())[0] == 200, "the connection of the client goes on"
            run.check_idle()

    asyncio.run(main())


def test_a_stream_is_whole_with_its_end_mark() -> None:
    async def main() -> None:
        async with running(streams(*EVENTS, ends=False)) as (run, _):
            assert (await run.ask())[2] == b"".join(EVENTS)

    asyncio.run(main())


def test_a_large_answer_that_dies_is_cut() -> None:
    async def large(request: Request, writer: Writer) -> None:
        writer.write(whole(b"x" * 1_000_000)[:-10])
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.transport.abort()

    async def main() -> None:
        async with running(large) as (run, _):
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await run.ask()
            run.check_idle()

    asyncio.run(main())


def test_a_client_that_leaves_ends_its_request() -> None:
    async def main() -> None:
        async with running(streams(EVENTS[0], b"", gap_s=3600), stalls) as (run, (streaming, silent)):
            for server in (streaming, silent):
                client = await run.client()
                client.send()
                await until(lambda one=server: one.n_asked == 1)
                assert run.router.proxy.n_in_flight == 1
                client.writer.transport.abort()
                await until(lambda one=server: one.n_gone == 1, "the end of its connection")
            await until(lambda: run.router.proxy.n_in_flight == 0)
            run.check_idle()
            assert b"router_clients_gone_total 2.0" in (await run.ask("GET", b"/metrics", b""))[2]

    asyncio.run(main())


def test_many_clients_come_and_go() -> None:
    async def main() -> None:
        async with running(streams(*EVENTS, gap_s=0.01), says("a"), policy="process_tokens") as (run, _):

            async def one(i: int) -> None:
                client = await run.client()
                client.send()
                if i % 3:
                    await client.answer()
                else:
                    await asyncio.sleep(0.002 * (i % 10))
                client.writer.transport.abort()

            await asyncio.gather(*(one(i) for i in range(200)))
            await until(lambda: run.router.proxy.n_in_flight == 0)
            run.check_idle()
            await until(lambda: not run.router.app.clients, "the end of all connections")

    asyncio.run(main())


def test_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy.router.server.SWEEP_S", 0.02)

    async def main() -> None:
        async with running(stalls, streams(EVENTS[0], b"", gap_s=3600), timeout_s=1.0) as (run, (_, streaming)):
            status, _, body = await run.ask()
            assert status == 504
            assert json.loads(body)["error"]["code"] == "timeout"
            status, _, body = await run.ask()
            assert status == 200
            assert b"--request-timeout-secs" in body
            await until(lambda: streaming.n_gone == 1)
            assert len(run.router.registry.available) == 2, "slow is not dead"
            run.check_idle()

    asyncio.run(main())


def test_a_slow_client_slows_the_server() -> None:
    n_sent = 0

    async def endless(request: Request, writer: Writer) -> None:
        nonlocal n_sent
        writer.write(SSE_HEAD)
        event = piece(b"data: " + b"x" * 65536 + b"\n\n")
        while n_sent < 1000:
            writer.write(event)
            await writer.drain()
            n_sent += 1
        writer.write(LAST)

    async def main() -> None:
        async with running(endless) as (run, _):
            client = await run.client()
            client.send()
            await until(lambda: n_sent > 1)
            n_before = -1
            while n_before != n_sent:  # until nothing moves any more
                n_before = n_sent
                await asyncio.sleep(0.3)
            assert n_sent < 700, "the router takes in what nobody reads"
            assert len((await client.answer())[2]) == 1000 * (65536 + 8)
            run.check_idle()

    asyncio.run(main())


def test_a_kept_connection_that_the_server_closed_is_not_an_error() -> None:
    n = 0

    async def closes_every_other(request: Request, writer: Writer) -> None:
        nonlocal n
        n += 1
        if n % 2:
            writer.write(whole(b"{}"))
        else:
            writer.close()

    async def main() -> None:
        async with running(closes_every_other) as (run, _):
            for _ in range(3):
                assert (await run.ask())[0] == 200
            assert len(run.router.registry.available) == 1

    asyncio.run(main())


def test_models_and_aborts_are_those_of_all_servers() -> None:
    def of(name: str) -> Script:
        async def script(request: Request, writer: Writer) -> None:
            answer: dict[str, Any] = {"object": "list", "data": [{"id": name}, {"id": "both"}]}
            if request["target"] == "/v1/abort_requests":
                mine = [one for one in json.loads(request["body"])["req_ids"] if one == name]
                others = [one for one in json.loads(request["body"])["req_ids"] if one != name]
                answer = {"result": {"aborted": [{"request_id": one} for one in mine], "not_found": others}}
            writer.write(whole(json.dumps(answer).encode()))

        return script

    async def main() -> None:
        async with running(of("a"), of("b")) as (run, servers):
            models = json.loads((await run.ask("GET", b"/v1/models", b"", extra="authorization: Bearer k\r\n"))[2])
            assert sorted(one["id"] for one in models["data"]) == ["a", "b", "both"]
            assert all(one.requests[0]["headers"]["authorization"] == "Bearer k" for one in servers)
            body = json.dumps({"req_ids": ["a", "b", "c"]}).encode()
            result = json.loads((await run.ask(target=b"/v1/abort_requests", body=body))[2])["result"]
            assert sorted(one["request_id"] for one in result["aborted"]) == ["a", "b"]
            assert result["not_found"] == ["c"]

    asyncio.run(main())


def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection() -> None:
    async def main() -> None:
        async with running(streams(*EVENTS)) as (run, _):
            client = await run.client()
            client.writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY))
            status, headers, body = await client.answer()
            assert (status, body) == (200, b"".join(EVENTS))
            assert "transfer-encoding" not in headers

    asyncio.run(main())
