"""Pairs of prefill and decode servers: who is told what, whose answer counts, and what happens when one fails."""

import asyncio
import json
from typing import Any

import pytest
from router_harness import LAST, SSE_HEAD, Running, Script, Writer, piece, running, until, whole

from fastdeploy.router.placement import PairSettings, disaggregate_info, fit, given_up
from fastdeploy.router.record import Record

pytestmark = pytest.mark.timeout(120)

PAIR = ("prefill", "decode")
LONG = json.dumps({"prompt": "word " * 200}).encode()


def says(text: str, **more: Any) -> Script:
    async def script(request: dict[str, Any], writer: Writer) -> None:
        writer.write(whole(json.dumps({"from": text, **more}).encode()))

    return script


async def dies(request: dict[str, Any], writer: Writer) -> None:
    writer.transport.abort()


async def stalls(request: dict[str, Any], writer: Writer) -> None:
    await asyncio.sleep(3600)


def refuses(status: str) -> Script:
    async def script(request: dict[str, Any], writer: Writer) -> None:
        writer.write(whole(b'{"error": {"message": "no"}}', status))

    return script


def record(role: str, tp_size: int = 1, **more: Any) -> Record:
    return Record(role=role, host_ip="10.0.0.1", port="8000", tp_size=tp_size, **more)


def test_what_a_pair_is_told() -> None:
    both = ("ipc", "rdma")
    prefill = record("prefill", 2, connector_port="71", transfer_protocol=both)
    decode = record(
        "decode", 2, connector_port="72", transfer_protocol=both, device_ids=("2", "3"), rdma_ports=("9", "10")
    )
    assert disaggregate_info(prefill, decode) == {
        "prefill_ip": "10.0.0.1",
        "decode_ip": "10.0.0.1",
        "prefill_connector_port": 71,
        "decode_connector_port": 72,
        "decode_device_ids": ["2", "3"],
        "decode_rdma_ports": ["9", "10"],
        "transfer_protocol": "ipc",
        "decode_tp_size": 2,
    }
    for other in (record("decode", 1, transfer_protocol=both), record("decode", 2, transfer_protocol=("rdma",))):
        assert disaggregate_info(prefill, other)["transfer_protocol"] == "rdma"
    assert [fit(record("prefill", p), record("decode", d)) for p, d in ((2, 2), (2, 1), (1, 2))] == [True, True, False]


def test_an_answer_that_was_given_up() -> None:
    assert given_up(b'{"choices": [{"finish_reason": "stop"}]}') is None
    assert given_up(b'{"choices": [{"finish_reason": "stop", "text": "pd_reschedule"}]}') is None
    assert given_up(b'{"choices": [{"finish_reason": "pd_reschedule", "completion_token_ids": [1, 2]}]}') == [1, 2]
    chat = b'{"choices": [{"finish_reason": "pd_reschedule", "message": {"completion_token_ids": [3]}}]}'
    assert given_up(chat) == [3]
    assert given_up(b'{"error": {"message": "PD Error: no pages"}}') == []
    assert given_up(b"pd_reschedule") is None


def test_both_get_the_request_and_decode_answers() -> None:
    async def main() -> None:
        async with running(says("P"), says("D"), roles=PAIR) as (run, (prefill, decode)):
            body = json.dumps({"prompt": "x", "disaggregate_info": {"prefill_ip": "evil"}}).encode()
            status, headers, answer = await run.ask(body=body, extra="x-request-id: me\r\n")
            assert (status, json.loads(answer)["from"]) == (200, "D")
            assert headers["x-router-prefill-url"] == f"http://127.0.0.1:{prefill.port}"
            assert headers["x-router-decode-url"] == f"http://127.0.0.1:{decode.port}"
            await until(lambda: prefill.n_asked == decode.n_asked == 1)
            (at_p,), (at_d,) = prefill.requests, decode.requests
            assert at_p["body"] == at_d["body"]
            fields = json.loads(at_p["body"])
            assert (fields["prompt"], fields["request_id"]) == ("x", "me")
            assert fields["disaggregate_info"]["prefill_ip"] == "127.0.0.1"
            assert fields["disaggregate_info"]["decode_connector_port"] == 7000
            await run.ask(body=b'{"prompt": "x", "request_id": "own"}')
            assert json.loads(decode.requests[1]["body"])["request_id"] == "own"
            await until(lambda: not run.router.proxy.legs)
            run.check_idle()
            assert (await run.ask(body=b"[1]"))[0] == 400
            assert b'router_pd_decisions_total{decision="pair"} 2.0' in (await run.ask("GET", b"/metrics", b""))[2]

    asyncio.run(main())


def test_roles_and_numbers() -> None:
    async def main() -> None:
        async with running(says("P"), says("D"), roles=PAIR) as (run, (prefill, decode)):
            status, answer = await run.register(prefill, role="mixed")
            assert (status, "only supports PREFILL/DECODE" in answer["msg"]) == (400, True)
            numbers = json.loads((await run.ask("GET", b"/registered_number", b""))[2])
            assert numbers == {"mixed": 0, "prefill": 1, "decode": 1}
            await run.register(decode, role="decode", version="v1")
            for query, n in ((b"", 1), (b"?version=v1", 1), (b"?version=v2", 0)):
                found = json.loads((await run.ask("GET", b"/decode_instances" + query, b""))[2])
                assert [one["port"] for one in found] == [str(decode.port)] * n
            await run.register(decode, role="decode", tp_size=2)
            status, _, answer = await run.ask()
            assert (status, "tensor parallel sizes" in json.loads(answer)["error"]["message"]) == (400, True)
            await run.register(decode, role="decode")
            await run.register(prefill, role="prefill", is_paused=True)
            status, _, answer = await run.ask()
            assert (status, json.loads(answer)["from"]) == (200, "D"), "decode does it all"
            await run.register(prefill, role="prefill")
            await run.register(decode, role="decode", is_paused=True)
            status, _, answer = await run.ask()
            assert (status, "prefill/decode" in json.loads(answer)["error"]["message"]) == (503, True)

    asyncio.run(main())


@pytest.mark.parametrize("bad", [dies, refuses("503 X"), refuses("429 X")])
@pytest.mark.parametrize("bad_role", PAIR)
def test_another_pair_is_tried_before_the_first_byte(bad: Script, bad_role: str) -> None:
    async def slow(request: dict[str, Any], writer: Writer) -> None:
        await asyncio.sleep(0.2)  # decode waits for prefill
        await says("D")(request, writer)

    roles = ("prefill", "prefill", "decode", "decode")
    scripts = [bad, says("P"), slow, slow] if bad_role == "prefill" else [says("P"), says("P"), bad, slow]

    async def main() -> None:
        async with running(*scripts, roles=roles) as (run, servers):
            for _ in range(3):
                status, _, answer = await run.ask()
                assert (status, json.loads(answer)["from"]) == (200, "D")
            ids = [json.loads(one["body"])["request_id"] for server in servers for one in server.requests]
            assert any(one.endswith("-retry1") for one in ids)
            await until(lambda: not run.router.proxy.legs)
            run.check_idle()

    asyncio.run(main())


def test_without_prefill_decode_does_it_all() -> None:
    """The only prefill server dies while it has the request: no client is told."""
    n = 0

    async def waits_for_prefill(request: dict[str, Any], writer: Writer) -> None:
        nonlocal n
        n += 1
        await (stalls if n == 1 else says("D"))(request, writer)

    async def main() -> None:
        async with running(dies, waits_for_prefill, roles=PAIR) as (run, (_, decode)):
            status, headers, answer = await run.ask()
            assert (status, json.loads(answer)["from"]) == (200, "D")
            assert "x-router-prefill-url" not in headers
            assert "disaggregate_info" not in json.loads(decode.requests[1]["body"])
            await until(lambda: decode.n_gone == 1, "the end of its half")
            page = (await run.ask("GET", b"/metrics", b""))[2].decode()
            assert 'router_pd_decisions_total{decision="failed"} 1.0' in page
            run.check_idle()

    asyncio.run(main())


def test_when_nobody_else_is_there() -> None:
    async def main() -> None:
        async with running(stalls, dies, roles=PAIR) as (run, (prefill, _)):
            status, _, answer = await run.ask()
            assert (status, "Failed to connect" in json.loads(answer)["error"]["message"]) == (502, True)
            await until(lambda: prefill.n_gone == 1, "the end of its half")
            run.check_idle()
        async with running(refuses("400 X"), stalls, roles=PAIR) as (run, (_, decode)):
            status, _, answer = await run.ask()
            assert (status, json.loads(answer)["error"]["message"]) == (400, "no"), "the client's mistake is told"
            await until(lambda: decode.n_gone == 1)
            run.check_idle()

    asyncio.run(main())


def test_a_client_that_leaves_ends_both_halves() -> None:
    async def main() -> None:
        async with running(stalls, stalls, roles=PAIR) as (run, (prefill, decode)):
            client = await run.client()
            client.send()
            await until(lambda: prefill.n_asked == decode.n_asked == 1)
            client.writer.transport.abort()
            await until(lambda: prefill.n_gone == decode.n_gone == 1, "the end of both")
            await until(lambda: run.router.proxy.n_in_flight == 0)
            run.check_idle()

    asyncio.run(main())


def test_prefill_is_free_at_its_first_byte() -> None:
    async def head_then_nothing(request: dict[str, Any], writer: Writer) -> None:
        writer.write(SSE_HEAD + piece(b"data: {}\n\n"))
        await asyncio.sleep(3600)

    async def streams(request: dict[str, Any], writer: Writer) -> None:
        writer.write(SSE_HEAD + piece(b'data: {"n": 1}\n\n'))
        await release.wait()
        writer.write(piece(b"data: [DONE]\n\n") + LAST)

    async def main() -> None:
        global release
        release = asyncio.Event()
        async with running(head_then_nothing, streams, roles=PAIR, timeout_s=3) as (run, _):
            client = await run.client()
            client.send()
            loads = {server.record.role: server.load for server in run.router.registry}
            await until(lambda: loads["decode"].n_requests_total == 1 and loads["prefill"].n_requests == 0)
            assert loads["decode"].n_requests == 1
            release.set()
            assert (await client.answer())[2].endswith(b"data: [DONE]\n\n")
            await until(lambda: not run.router.proxy.legs, "the deadline of what prefill still says")
            run.check_idle()

    asyncio.run(main())


release: asyncio.Event


async def asked(run: Running, body: bytes) -> str:
    status, headers, _ = await run.ask(body=body)
    assert status == 200
    return "pair" if "x-router-prefill-url" in headers else "alone"


def test_short_and_cached_prompts_go_to_decode_alone() -> None:
    async def main() -> None:
        pairs = PairSettings(min_prompt_tokens=100)
        async with running(says("P"), says("D"), roles=PAIR, pairs=pairs) as (run, (_, decode)):
            assert await asked(run, b'{"prompt": "short"}') == "alone"
            assert "disaggregate_info" not in json.loads(decode.requests[0]["body"])
            assert await asked(run, json.dumps({"prompt": [7] * 100}).encode()) == "pair"
            assert await asked(run, LONG) == "pair"
            assert await asked(run, LONG) == "alone", "decode has it all"
            assert await asked(run, json.dumps({"prompt": "word " * 200 + "other " * 200}).encode()) == "pair"
            page = (await run.ask("GET", b"/metrics", b""))[2].decode()
            for name, n in (("pair", 3), ("short", 1), ("cached", 1)):
                assert f'router_pd_decisions_total{{decision="{name}"}} {n}.0' in page

    asyncio.run(main())


def test_what_decode_gives_up_is_placed_again() -> None:
    n = 0

    async def gives_up_once(request: dict[str, Any], writer: Writer) -> None:
        nonlocal n
        n += 1
        choice = {"finish_reason": "pd_reschedule", "completion_token_ids": [5, 6]} if n == 1 else {}
        writer.write(whole(json.dumps({"n": n, "choices": [choice]}).encode()))

    gives_up = says("D", error={"message": "PD Error: preempted"})

    async def main() -> None:
        async with running(says("P"), gives_up_once, roles=PAIR) as (run, (prefill, decode)):
            assert json.loads((await run.ask(body=b'{"prompt": "x", "request_id": "r"}'))[2])["n"] == 2
            again = json.loads(decode.requests[1]["body"])
            assert (again["request_id"], again["completion_token_ids"]) == ("r-retry1", [5, 6])
            assert "disaggregate_info" not in again, "one server does the rest"
            await run.ask(body=b'{"prompt": "x", "completion_token_ids": [5]}')
            assert "disaggregate_info" not in json.loads(decode.requests[2]["body"])
            assert prefill.n_asked == 1
            assert b'router_pd_decisions_total{decision="begun"} 2.0' in (await run.ask("GET", b"/metrics", b""))[2]
        pairs = PairSettings(preempt_retry_count=2, preempt_retry_exclude_decode=True)
        async with running(says("P"), gives_up, roles=PAIR, pairs=pairs) as (run, (_, decode)):
            assert b"PD Error" in (await run.ask())[2], "in the end the client is told"
            assert decode.n_asked == 3
            await until(lambda: not run.router.proxy.legs)
            run.check_idle()

    asyncio.run(main())
