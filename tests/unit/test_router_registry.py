"""Which servers the router knows: registration, heartbeats, expiry, health checks; how a server keeps registered."""

import asyncio
import json
from typing import Any

import pytest
from router_harness import Writer, running, until, whole

from fastdeploy.errors import ConfigError, InvalidRequest
from fastdeploy.router.health import ManagerSettings
from fastdeploy.router.ledger import RemoteFigures
from fastdeploy.router.record import Record, parse_record, record_of
from fastdeploy.router.registration import RouterAddress, keep_registered, own_address, router_addresses
from fastdeploy.router.registry import EXPIRY_S, Registry

pytestmark = pytest.mark.timeout(60)

GOOD: dict[str, Any] = {"role": "mixed", "host_ip": "10.0.0.1", "port": 8000}


def record(**fields: Any) -> Record:
    return record_of({**GOOD, **fields})


def urls(registry: Registry) -> list[str]:
    return [server.url for server in registry.available]


async def says_ok(request: dict[str, Any], writer: Writer) -> None:
    writer.write(whole(b"{}"))


def test_a_record_is_brought_to_one_form() -> None:
    body = {
        **GOOD,
        "role": "MIXED",
        "port": "08000",
        "metrics_port": 8001,
        "rdma_ports": [1, "2"],
        "device_ids": [0, "1"],
        "transfer_protocol": ["IPC", "rdma"],
        "connected_decodes": [{"host_ip": "x"}],
        "something_new": 1,
    }
    parsed = parse_record(json.dumps(body).encode())
    assert (parsed.role, parsed.url, parsed.metrics_port) == ("mixed", "http://10.0.0.1:8000", "8001")
    assert (parsed.rdma_ports, parsed.device_ids, parsed.tp_size) == (("1", "2"), ("0", "1"), 2)
    assert parsed.transfer_protocol == ("ipc", "rdma")
    assert record(tp_size=4).tp_size == 4
    assert record(host_ip="::1").url == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"role": None}, "role is required"),
        ({"role": "boss"}, "invalid role 'boss'"),
        ({"host_ip": ""}, "host_ip is required"),
        ({"host_ip": "some.name"}, "invalid host_ip 'some.name'"),
        ({"port": None}, "port is required"),
        ({"port": 0}, "invalid port 0"),
        ({"port": "65536"}, "invalid port '65536'"),
        ({"metrics_port": "x"}, "invalid metrics_port"),
        ({"transfer_protocol": ["tcp"]}, "invalid protocol"),
        ({"tp_size": 0}, "invalid tp_size 0"),
        ({"port": [1]}, "port"),
    ],
)
def test_wrong_records_name_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_record(json.dumps({**GOOD, **wrong}).encode())
    with pytest.raises(ConfigError, match=message):
        record_of({**GOOD, **wrong})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_record(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="invalid"):
        parse_record(body)


def test_servers_are_sorted_and_known_by_url() -> None:
    registry = Registry()
    for port in (8002, 8001, 8003):
        registry.add(record(port=port), 0.0, is_well=port != 8003)
    assert urls(registry) == ["http://10.0.0.1:8001", "http://10.0.0.1:8002"]
    assert registry.counts() == {"mixed": 3, "prefill": 0, "decode": 0}
    first = registry.find("http://10.0.0.1:8001")
    assert first is not None
    assert registry.heartbeat(record(port=8001, metrics_port=9000, version="2"), 1.0) is first
    assert first.record.version == "2"
    assert first.metrics is not first.upstream
    assert registry.heartbeat(record(port=8003), 1.0) is None, "not well: it must be looked at first"
    assert registry.heartbeat(record(port=8004), 1.0) is None
    assert [one.url for one in registry.available_without({first.url})] == ["http://10.0.0.1:8002"]
    registry.heartbeat(record(port=8002, is_paused=True), 1.0)
    assert urls(registry) == ["http://10.0.0.1:8001"]


def test_heartbeats_that_stop() -> None:
    registry = Registry()
    once, often = record(port=8001), record(port=8002)
    registry.add(once, 0.0, is_well=True)
    registry.add(often, 0.0, is_well=True)
    registry.add(record(port=8003), 0.0, is_well=True, is_static=True)
    registry.heartbeat(often, 5.0)
    registry.expire(5.0 + EXPIRY_S)
    assert len(registry) == 3
    registry.expire(5.1 + EXPIRY_S)
    assert urls(registry) == ["http://10.0.0.1:8001", "http://10.0.0.1:8003"], "one that never had any stays"


def test_a_failed_check_removes_or_skips() -> None:
    registry = Registry()
    moving = registry.add(record(port=8001), 0.0, is_well=True)
    static = registry.add(record(port=8002), 0.0, is_well=True, is_static=True)
    load = moving.load
    for server in (moving, static):
        registry.failed_check(server, "why")
    assert urls(registry) == []
    assert len(registry) == 1
    registry.well(static)
    registry.well(moving)
    assert urls(registry) == ["http://10.0.0.1:8002"], "one that was removed does not come back by itself"
    generation = load.generation
    back = registry.add(record(port=8001), 0.0, is_well=True)
    assert back.load is load
    assert load.generation > generation


def test_registration_over_http() -> None:
    async def main() -> None:
        async with running(says_ok) as (run, (server,)):
            assert await run.register(server) == (200, {"code": 200, "msg": "Register success", "status": "success"})
            status, answer = await run.register(server, role="prefill")
            assert (status, answer["code"]) == (400, 400)
            assert "only MIXED instances are allowed" in answer["msg"] == answer["detail"]
            status, answer = await run.register(server, port=1)
            assert status == 503
            assert "service is not healthy" in answer["msg"]
            shown = json.loads((await run.ask("GET", b"/registered", b""))[2])
            assert (shown["prefill"], shown["decode"], len(shown["mixed"])) == ([], [], 1)
            assert shown["mixed"][0]["url"] == f"http://127.0.0.1:{server.port}"
            assert shown["mixed"][0]["worker_type"] == "mixed"
            number = json.loads((await run.ask("GET", b"/registered_number", b""))[2])
            assert number == {"mixed": 1, "prefill": 0, "decode": 0}
            status, _, body = await run.ask("GET", b"/health_generate", b"")
            assert (status, json.loads(body)["msg"], json.loads(body)["healthy"]) == (200, "Health check complete", 1)
            assert (await run.ask("GET", b"/health", b""))[::2] == (200, b"")
            body = json.dumps({**GOOD, "host_ip": "127.0.0.1", "port": server.port}).encode()
            assert (await run.ask(target=b"/unregister", body=body))[0] == 200
            assert len(run.router.registry) == 0

    asyncio.run(main())


def test_thresholds_of_health_checks() -> None:
    async def main() -> None:
        settings = {"health_check_interval_secs": 0.05, "health_failure_threshold": 3}
        async with running(says_ok, **settings) as (run, (server,)):
            assert ManagerSettings().health_failure_threshold == 1
            known = next(iter(run.router.registry))
            run.router.registry.unwell(known, "test")
            await until(lambda: known.is_well, "its next check")
            server.health = 500
            await until(lambda: len(run.router.registry) == 0, "its removal")
            assert (await run.register(server))[0] == 503

    asyncio.run(main())


def test_figures_are_asked_for_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy.router.health.POLL_S", 0.02)
    page = b"fastdeploy:num_requests_running 3.0\nfastdeploy:num_requests_waiting 1.0\n"

    async def with_figures(request: dict[str, Any], writer: Writer) -> None:
        writer.write(whole(page if request["target"] == "/metrics" else b"{}"))

    async def main() -> None:
        nonlocal page
        async with running(with_figures, policy="fd_remote_metrics_score") as (run, _):
            load = next(iter(run.router.registry)).load
            await until(lambda: load.remote == RemoteFigures(3, 1, 0), "figures")
            assert (await run.ask())[0] == 200
            page = b""
            await until(lambda: load.remote is None, "that old figures are forgotten")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:30000", [("127.0.0.1", 30000)]),
        ("http://10.1.1.1:9000/", [("10.1.1.1", 9000)]),
        ("a:1, [::1]:2", [("a", 1), ("::1", 2)]),
    ],
)
def test_addresses_of_routers(text: str, expected: list[tuple[str, int]]) -> None:
    assert [(one.host, one.port) for one in router_addresses(text)] == expected


@pytest.mark.parametrize(
    "text", ["", "host", "host:x", "host:99999", "https://host:1", "host:1/path", ":5", "user@h:1"]
)
def test_wrong_addresses_of_routers(text: str) -> None:
    with pytest.raises(ConfigError, match="--router"):
        router_addresses(text)


def test_the_address_that_a_router_is_told() -> None:
    async def main() -> None:
        near = RouterAddress("127.0.0.1", 30000)
        assert await own_address("0.0.0.0", near) == "127.0.0.1"
        assert await own_address("127.0.0.2", near) == "127.0.0.2"
        assert await own_address("localhost", near) in ("127.0.0.1", "::1")

    asyncio.run(main())


def test_a_server_keeps_registered() -> None:
    is_well = False

    async def main() -> None:
        nonlocal is_well
        async with running(says_ok) as (run, (server,)):
            registry = run.router.registry
            registry.remove(next(iter(registry)), "test")
            address = router_addresses(f"0.0.0.0:{run.port}")
            nowhere = RouterAddress("127.0.0.1", 1)
            work = keep_registered(
                (*address, nowhere), "0.0.0.0", server.port, server.port, lambda: is_well, interval_s=0.02
            )
            task = asyncio.create_task(work)
            await asyncio.sleep(0.1)
            assert len(registry) == 0, "a server that is not well says nothing"
            is_well = True
            await until(lambda: len(registry) == 1, "its registration")
            registry.remove(next(iter(registry)), "as if the router had started anew")
            await until(lambda: len(registry) == 1, "its next heartbeat")
            await until(lambda: next(iter(registry)).n_heartbeats > 3, "heartbeats")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(registry) == 0, "it says good-bye"

    asyncio.run(main())
