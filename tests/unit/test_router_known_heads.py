"""Heads that are looked up instead of parsed: what comes out must be what the parser would have made of them."""

import asyncio
from typing import Any

import pytest
from router_harness import Writer, running, whole

from fastdeploy.router.known_heads import MAX_HEADS, MAX_KEY_BYTES, KnownHeads

pytestmark = pytest.mark.timeout(120)

START = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


def request(extra: bytes = b"", body: bytes = b"{}") -> bytes:
    return START + extra + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def test_a_head_is_found_with_another_length_and_id() -> None:
    heads: KnownHeads[str] = KnownHeads(of_requests=True)
    names = [b"host", b"x-request-id", b"content-length"]
    heads.keep(request(b"x-request-id: a\r\n"), "read", names)
    assert heads.find(request(b"X-Request-Id: other\r\n", b"x" * 1234)) == (
        "read",
        b"x" * 1234,
        [b"X-Request-Id: other"],
    )
    assert heads.find(request()) == ("read", b"{}", [])


@pytest.mark.parametrize(
    "data",
    [
        request()[:-1],  # not whole
        request() + b"P",  # something behind it
        request()[:20],
        request(b"a: b\r\n"),
        request(b"content-length: 2\r\n"),
        request(b"transfer-encoding: chunked\r\n"),
        request(b"x-request-id : a\r\n"),  # no header at all
        request(b"x-request-id: a\n"),
        request().replace(b"POST", b"PUT"),
        request().replace(b"content-length: 2", b"content-length: +2"),
        b"",
    ],
)
def test_others_are_not(data: bytes) -> None:
    heads: KnownHeads[str] = KnownHeads(of_requests=True)
    heads.keep(request(), "read", [b"host", b"content-length"])
    assert heads.find(request()) is not None
    assert heads.find(data) is None


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        (b"content-length: 2\r\n", [b"content-length"]),
        (b"transfer-encoding: x\r\n", [b"transfer-encoding"]),
        (b"expect: 100-continue\r\n", [b"expect"]),
        (b"x-request-id:a\r\n", [b"x-request-id"]),  # read as an id by the parser, and not cut out here
        (b"a: " + b"x" * MAX_KEY_BYTES + b"\r\n", [b"a"]),
    ],
)
def test_unusual_heads_are_not_kept(extra: bytes, names: list[bytes]) -> None:
    heads: KnownHeads[str] = KnownHeads(of_requests=True)
    heads.keep(request(extra), "read", [b"host", *names, b"content-length"])
    assert heads.find(request(extra)) is None


def test_they_are_bounded() -> None:
    heads: KnownHeads[int] = KnownHeads(of_requests=True)
    for i in range(2 * MAX_HEADS + 1):
        heads.keep(request(b"a: %d\r\n" % i), i, [b"host", b"a", b"content-length"])
    found = [i for i in range(2 * MAX_HEADS + 1) if heads.find(request(b"a: %d\r\n" % i))]
    assert found == [2 * MAX_HEADS]


def test_requests_with_a_known_head_are_answered_like_the_first() -> None:
    seen: list[dict[str, Any]] = []

    async def dated(request: dict[str, Any], writer: Writer) -> None:
        seen.append(request)
        extra = f"date: day {len(seen)}\r\nx-request-id: {request['headers']['x-request-id']}\r\nx-a: b\r\n"
        answer = whole(b"%d" % len(seen) * len(seen))
        writer.write(answer.replace(b"\r\n", b"\r\n" + extra.encode(), 1))

    async def main() -> None:
        async with running(dated) as (run, _):
            client = await run.client()
            for i in range(1, 5):
                extra = f"authorization: me\r\nconnection: keep-alive\r\nx-request-id: id{i}\r\n"
                status, headers, body = await client.ask(body=b"x" * i, extra=extra)
                assert (status, body) == (200, b"%d" % i * i)
                assert (headers["date"], headers["x-request-id"], headers["x-a"]) == (f"day {i}", f"id{i}", "b")
            assert [one["body"] for one in seen] == [b"x" * i for i in range(1, 5)]
            assert [one["headers"].pop("x-request-id") for one in seen] == [f"id{i}" for i in range(1, 5)]
            assert [one["headers"].pop("content-length") for one in seen] == [str(i) for i in range(1, 5)]
            assert all(one["headers"] == seen[0]["headers"] for one in seen)
            assert seen[0]["headers"]["authorization"] == "me"
            # Without an id, each gets one of its own.
            for _ in range(3):
                await client.ask()
            assert len({one["headers"].get("x-request-id") for one in seen[4:]}) == 3
            # Two requests in one piece, and one in two pieces.
            client.send(body=b"first")
            client.send(body=b"second")
            assert [(await client.answer())[0] for _ in range(2)] == [200, 200]
            client.writer.write(request(b"", b"abcd")[:-2])
            await asyncio.sleep(0.05)
            client.writer.write(b"cd")
            assert (await client.answer())[0] == 200
            assert [one["body"] for one in seen[7:]] == [b"first", b"second", b"abcd"]
            run.check_idle()

    asyncio.run(main())


def test_a_known_head_lets_nothing_past_the_parser() -> None:
    async def echo(request: dict[str, Any], writer: Writer) -> None:
        writer.write(whole(request["body"] or b"-"))

    async def main() -> None:
        async with running(echo) as (run, (server,)):
            for extra in (b"content-length: 7\r\n", b"transfer-encoding: chunked\r\n"):
                client = await run.client()
                client.writer.write(request())
                assert (await client.answer())[0] == 200
                client.writer.write(request(extra))
                assert (await client.answer())[0] == 400
                assert await client.is_closed()
            assert server.n_asked == 2

    asyncio.run(main())
