"""Servers that share requests through a real Redis: placement, faults, and no token lost or doubled on any of them."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from shared_rooms import PATIENCE_S, Answer, SimEngines, SimServer, server, token

from fastdeploy.admission.messages import Record, decode_letter, encode_json
from fastdeploy.admission.pairs import pairing_of
from fastdeploy.admission.private_redis import PrivateRedis
from fastdeploy.wire.messages import Pairing

pytestmark = pytest.mark.timeout(180)
N_PROMPT, N_TOKENS = 10, 8


@pytest.fixture
def redis() -> Iterator[PrivateRedis]:
    with PrivateRedis() as running:
        yield running


async def until(holds: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


async def finished(answer: Answer, n_prompt: int = N_PROMPT, n_tokens: int = N_TOKENS) -> None:
    """The answer is complete, and each token is there once and in its place."""
    async with asyncio.timeout(PATIENCE_S):
        last = await answer.last
    assert last.finish_reason == "length", last
    assert answer.token_ids == [token(list(range(n_prompt)), i) for i in range(n_tokens)]


async def cluster_of(servers: list[SimServer], n: int | None = None) -> None:
    """All servers see each other."""
    for one in servers:
        wanted = len(servers) if n is None else n
        await until(lambda one=one, wanted=wanted: len(one.room.placement._cluster.records) >= wanted, "a full cluster")


async def several(stack: AsyncExitStack, redis: PrivateRedis, n: int, **settings: Any) -> list[SimServer]:
    servers = [await stack.enter_async_context(server(redis, **settings)) for _ in range(n)]
    if settings.get("name", "splitwise") == "splitwise":
        await cluster_of(servers)
    return servers


def test_requests_of_one_server_spread_evenly(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            servers = await several(stack, redis, 3)
            answers = [servers[0].ask(f"r{i}", n_prompt=200, n_tokens=40) for i in range(90)]
            for answer in answers:
                await finished(answer, 200, 40)
            ran = [len(one.engines.ran) for one in servers]
            assert sum(ran) == 90, ran
            assert min(ran) >= 20, ran
            assert all(not one.room.accepted.entries and not one.room.executions.alive for one in servers)
            assert all(one.engines.load.n_prompt_tokens == 0 for one in servers)

    asyncio.run(run())


def test_a_request_is_no_load_twice_when_its_receipt_is_read_late(redis: PrivateRedis) -> None:
    """What counts is when the other server took it, which its load report says, too."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            here, there = await several(stack, redis, 2)
            here.engines.step_s = there.engines.step_s = 60.0
            now_s = here.room.link.now_s
            here.room.link.now_s = lambda: now_s() + 0.5  # type: ignore[method-assign]
            for i in range(2):
                here.ask(f"r{i}", n_prompt=300)
            placement = here.room.placement
            (node,) = there.room.placement.nodes

            def is_reported() -> bool:
                record = placement._cluster.records[node]
                return record.load == 300 and all(e.taken_s is not None for e in here.room.accepted.remote())

            await until(is_reported, "the report of the other server's load")
            assert placement._view()[1][node] == 300

    asyncio.run(run())


def test_idle_servers_write_little(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            servers = await several(stack, redis, 2)
            before = servers[0].room.metrics.reports
            await asyncio.sleep(2.0)
            # every 0.25 s with this expiry of 1 s, whatever the sync period of 5 ms
            assert 1 <= servers[0].room.metrics.reports - before <= 20

    asyncio.run(run())


@pytest.mark.parametrize("began", [False, True])
def test_lost_node(redis: PrivateRedis, began: bool) -> None:
    """Before the first token and after it: the answer is the one that it would have been."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            servers = await several(stack, redis, 2)
            here, there = servers
            there.engines.step_s = 0.02 if began else 60.0
            answers = [here.ask(f"r{i}", n_prompt=300, n_tokens=60) for i in range(12)]
            await until(lambda: there.room.executions.alive, "requests on the other server")
            theirs = [answers[int(e.request_id[1:])] for e in there.room.executions.alive.values()]
            for answer in theirs if began else []:
                await asyncio.wait_for(answer.began.wait(), PATIENCE_S)
            await there.kill()
            for answer in answers:
                await finished(answer, 300, 60)
            assert here.room.accepted.n_placed_again >= len(theirs)
            continued = [start for start in here.engines.starts if start.output_ids]
            assert bool(continued) == began

    asyncio.run(run())


def test_a_server_that_wakes_up_late_doubles_nothing(redis: PrivateRedis) -> None:
    """Its requests were given away; what it says about them is void, and it is told to stop."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            here, there = await several(stack, redis, 2)
            there.engines.step_s = 0.05
            answers = [here.ask(f"r{i}", n_prompt=300, n_tokens=30) for i in range(12)]
            await until(lambda: there.room.executions.alive, "requests on the other server")
            here.room.lose_nodes(set(there.room.placement.nodes))  # as if it had been silent; it is not
            for answer in answers:
                await finished(answer, 300, 30)
            await until(lambda: not there.room.executions.alive, "the other server to stop")

    asyncio.run(run())


def test_a_server_that_accepted_and_died_leaves_no_work(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            here, there = await several(stack, redis, 2)
            there.engines.step_s = 60.0
            for i in range(8):
                here.ask(f"r{i}", n_prompt=300)
            await until(lambda: there.room.executions.alive, "requests on the other server")
            await here.kill()
            await until(lambda: not there.room.executions.alive, "the other server to notice")

    asyncio.run(run())


def test_orderly_end_hands_requests_over(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            here = (await several(stack, redis, 1))[0]
            there = SimEngines(step_s=0.02)
            async with server(redis, there) as other:
                await cluster_of([here], 2)
                answers = [here.ask(f"r{i}", n_prompt=300, n_tokens=60) for i in range(8)]
                await until(lambda: other.room.executions.alive, "requests on the other server")
            for answer in answers:
                await finished(answer, 300, 60)

    asyncio.run(run())


def test_abort_reaches_the_other_server(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            here, there = await several(stack, redis, 2)
            there.engines.step_s = here.engines.step_s = 60.0
            names = [f"r{i}" for i in range(8)]
            answers = [here.ask(name, n_prompt=300) for name in names]
            await until(lambda: there.room.executions.alive, "requests on the other server")
            here.room.abort(names)
            assert [(await answer.last).finish_reason for answer in answers] == ["abort"] * 8
            await until(lambda: not there.room.executions.alive, "the other server to stop")
            assert here.engines.load.n_requests == 0

    asyncio.run(run())


@pytest.mark.parametrize("name", ["splitwise", "global"])
@pytest.mark.parametrize("fault", ["restart", "cut"])
def test_redis_restarts_or_is_cut_off(redis: PrivateRedis, name: str, fault: str) -> None:
    """Requests of the accepting server go on meanwhile; every other one ends with its whole answer."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            servers = await several(stack, redis, 2, name=name)
            for one in servers:
                one.engines.step_s = 0.02
            answers = [servers[0].ask(f"r{i}", n_prompt=300, n_tokens=50) for i in range(10)]
            await until(lambda: servers[1].room.executions.alive, "requests on the other server")
            if fault == "restart":
                await asyncio.to_thread(redis.restart)
            else:
                redis.process.send_signal(signal.SIGSTOP)
                before = list(servers[0].engines.ran)
                answers.append(servers[0].ask("late", n_prompt=300, n_tokens=50))
                await finished(answers[-1], 300, 50)
                assert len(servers[0].engines.ran) > len(before)
                await asyncio.sleep(2.0)
                assert servers[0].room.health() is None
                assert "unreachable" in servers[0].room.note()["redis"]
                redis.process.send_signal(signal.SIGCONT)
            for answer in answers:
                await finished(answer, 300, 50)
            await until(lambda: not servers[1].room.executions.alive, "the other server to be done")
            await until(lambda: not servers[0].room.link.down_s, "Redis to be noticed again")

    asyncio.run(run())


def test_no_node_before_ttl_is_an_error(redis: PrivateRedis) -> None:
    async def run() -> None:
        engines = SimEngines()
        engines.serves = False
        async with server(redis, engines, ttl_s=1.0) as only:
            last = await asyncio.wait_for(only.ask("r").last, PATIENCE_S)
            assert (last.finish_reason, last.error_kind) == ("error", "RequestTimeout")

    asyncio.run(run())


def test_a_request_that_ends_every_engine_is_given_up(redis: PrivateRedis) -> None:
    async def run() -> None:
        engines = SimEngines()

        class Fatal(SimEngines):
            def submit(self, requests: Any, inbox: Any) -> None:
                inbox.fail(RuntimeError("it died"))

        engines = Fatal()
        async with server(redis, engines) as only:
            last = await asyncio.wait_for(only.ask("r").last, PATIENCE_S)
            assert last.error_kind == "EngineUnavailable"
            assert "it died" in (last.error or "")

    asyncio.run(run())


def test_idle_servers_steal(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            here, there = await several(stack, redis, 2, name="global")
            answers = [here.ask(f"r{i}", n_tokens=20) for i in range(40)]
            for answer in answers:
                await finished(answer, n_tokens=20)
            assert there.room.metrics.stolen >= 5
            assert len(here.engines.ran) + len(there.engines.ran) == 40
            assert not here.room.executions.alive
            assert not there.room.executions.alive

    asyncio.run(run())


def test_a_thief_that_dies_loses_nothing(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            here, there = await several(stack, redis, 2, name="global")
            there.engines.step_s = 60.0
            answers = [here.ask(f"r{i}", n_tokens=20) for i in range(20)]
            await until(lambda: there.room.executions.alive, "a theft")
            await there.kill()
            for answer in answers:
                await finished(answer, n_tokens=20)

    asyncio.run(run())


def test_a_pair_gets_decode_first_and_one_transport(redis: PrivateRedis) -> None:
    """Simulated nodes: their queues are looked at, their answers written by hand."""

    async def run() -> None:
        own = {"role": "prefill", "cache_info": {"rdma": {"ip": "10.0.0.1", "port": 9}}}
        async with server(redis, disaggregated={0: own}, role="prefill") as here:
            # The accepting server prefills; a decode node is only a record and a queue.
            room = here.room
            info = {"role": "decode", "transfer_protocol": ["ipc", "rdma"], "cache_info": {"rdma": {"port": 7}}}
            record = Record(room.link.now_s(), "decode", 0, "elsewhere", info, room.fingerprint)
            await room.link.client.hset("test.cluster", "d0", encode_json(record))
            here.ask("r")
            await until(lambda: room.accepted.entries["r"].nodes, "a place")
            prefill = next(iter(room.placement.nodes))
            assert room.accepted.entries["r"].nodes == ("d0", prefill)
            while not (letters := await room.link.client.lrange("ReqQ_d0", 0, -1)):
                await asyncio.sleep(0.01)
            letter = decode_letter(letters[0])
            address = {"prefill_ip": "10.0.0.1", "prefill_connector_port": 9}
            assert letter.disaggregate_info == {**info, "transfer_protocol": "rdma", **address}
            assert pairing_of(letter.disaggregate_info, "decode") == Pairing("decode", "10.0.0.1", 9)
            assert pairing_of(letter.disaggregate_info, "mixed") is None
            await until(lambda: here.engines.ran, "the prefill node's copy")
            assert room.accepted.entries["r"].output_ids == []  # its tokens are not the answer

    asyncio.run(run())


def test_letters_that_are_none_are_passed_over(redis: PrivateRedis) -> None:
    async def run() -> None:
        async with server(redis) as only:
            node = next(iter(only.room.placement.nodes))
            for key in (f"ReqQ_{node}", f"{node}-0"):
                await only.room.link.client.lpush(key, b"\x80\x04nonsense", b'{"type":"request"}')
            await only.room.link.client.hset("test.cluster", "x", b"nonsense")
            await finished(only.ask("r"))

    asyncio.run(run())
