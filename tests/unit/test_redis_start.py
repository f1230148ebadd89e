"""What is said when there is no usable Redis at start, and that it is said within 5 s: servers that speak its protocol
by hand, as versions that old cannot be installed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis
from redis.exceptions import RedisError

from fastdeploy.admission.link import RedisLink
from fastdeploy.admission.metrics import AdmissionMetrics
from fastdeploy.admission.private_redis import PrivateRedis
from fastdeploy.config.admission import resolve_admission
from fastdeploy.config.args import EngineArgs
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 5.0

Answers = Callable[[bytes], bytes]


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


def redis_5(command: bytes) -> bytes:
    if command in (b"HELLO", b"CLIENT"):
        return b"-ERR unknown command `%b`, with args beginning with: `3`, \r\n" % command
    return bulk(b"redis_version:5.0.7\r\nrun_id:x\r\n") if command == b"INFO" else b"+OK\r\n"


def redis_of(version: bytes) -> Answers:
    """Knows RESP3, and as little of CLIENT as versions before 7.2."""

    def answer(command: bytes) -> bytes:
        if command == b"HELLO":
            return b"%%2\r\n%b%b%b:3\r\n" % (bulk(b"version"), bulk(version), bulk(b"proto"))
        if command == b"CLIENT":
            return b"-ERR Unknown subcommand or wrong number of arguments for 'SETINFO'\r\n"
        if command == b"TIME":
            return b"*2\r\n%b%b" % (bulk(b"1"), bulk(b"2"))
        return bulk(b"redis_version:%b\r\nrun_id:x\r\n" % version) if command == b"INFO" else b"+OK\r\n"

    return answer


@asynccontextmanager
async def listening(answer: Answers | None) -> AsyncIterator[int]:
    """The port of a server that answers commands, or takes connections and says nothing."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while first := await reader.readline():
                words = []
                for _ in range(int(first[1:])):
                    n_bytes = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(n_bytes + 2))[:-2])
                if answer is not None:
                    writer.write(answer(words[0].upper()))
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def refusal(answer: Answers | None, is_there: bool = True) -> str:
    """What opening the link says; it must be said in time."""

    async def main() -> str:
        async with listening(answer) as port:
            if is_there:
                return await said_by(port)
        return await said_by(port)

    return asyncio.run(main())


async def said_by(port: int) -> str:
    link = opener("splitwise", port)
    began_s = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        await link.open()
    assert time.monotonic() - began_s < LIMIT_S
    return str(caught.value)


def opener(name: str, port: int) -> RedisLink:
    args = EngineArgs(scheduler_name=name, scheduler_host="127.0.0.1", scheduler_port=port)
    return RedisLink(resolve_admission(args), AdmissionMetrics(CollectorRegistry()))


@pytest.mark.parametrize(
    ("answer", "version"),
    [(redis_5, "older than 6.0"), (redis_of(b"6.0.16"), "6.0.16"), (redis_of(b""), "of unknown version")],
)
def test_a_redis_that_is_too_old_is_named(answer: Answers, version: str) -> None:
    said = refusal(answer)
    assert f"Redis {version} at 127.0.0.1:" in said
    assert "too old" in said and "6.2 is needed" in said
    assert "--scheduler-db" not in said


def test_one_that_says_nothing_is_given_up_in_time() -> None:
    said = refusal(None)
    assert "no Redis at 127.0.0.1:" in said
    assert "fastdeploy redis --port" in said


def test_none_at_all_is_said_with_how_to_start_one() -> None:
    said = refusal(None, is_there=False)
    assert "no Redis at 127.0.0.1:" in said
    assert "fastdeploy redis --port" in said


def test_a_new_enough_one_is_taken() -> None:
    async def main() -> None:
        async with listening(redis_of(b"6.2.0")) as port:
            link = opener("global", port)
            await link.open()
            assert link.state == "reachable"
            await link.close()

    asyncio.run(main())


def test_a_private_one_without_password() -> None:
    with PrivateRedis(has_password=False) as server:
        assert "--scheduler-password" not in server.flags
        with Redis(server.host, server.port, socket_timeout=5.0) as client:
            assert client.ping()


def test_a_private_one_asks_for_its_password() -> None:
    with PrivateRedis() as server:
        assert server.flags[-1] == server.password
        with (
            Redis(server.host, server.port, socket_timeout=5.0) as client,
            pytest.raises(RedisError, match="authenticated"),
        ):
            client.ping()
