"""Back-off, the judgement of health answers, the start report: pure parts of the supervisor."""

import asyncio
import io
import logging
import math

import pytest

from fastdeploy.entrypoints.supervise.announce import Bound, Up, decode_announcement, encode_announcement
from fastdeploy.entrypoints.supervise.backoff import Backoff
from fastdeploy.entrypoints.supervise.health import Answer, HealthWatch, ask
from fastdeploy.entrypoints.supervise.report import Row, StartReport, table

pytestmark = pytest.mark.timeout(30)

WELL, UNWELL = Answer(200), Answer(503, "engine core silent")


def test_backoff_doubles_up_to_its_limit_and_forgets_after_a_healthy_minute() -> None:
    backoff = Backoff()
    assert [backoff.next_delay_s(0.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.next_delay_s(59.0) == 30
    assert [backoff.next_delay_s(60.0), backoff.next_delay_s(1.0)] == [1, 2]
    assert Backoff(n_deaths=5000).next_delay_s(0.0) == 30


def verdicts(answers: list[tuple[float, Answer | None]], unwell_s: float = math.inf) -> list[bool]:
    watch = HealthWatch(0.0, 7.0, unwell_s)
    return [watch.verdict(answer, now_s) is not None for now_s, answer in answers]


def test_silence_takes_time_and_two_polls() -> None:
    assert verdicts([(1, WELL), (6, None), (9, None)]) == [False, False, True]
    assert verdicts([(1, WELL), (60, None), (61, None)]) == [False, False, True]
    assert verdicts([(1, WELL), (3, None), (6, None), (6.5, UNWELL), (10, None), (13, None)]) == [False] * 6
    assert verdicts([(3, None), (6, None), (9, None)]) == [False, False, True]


def test_a_server_that_stays_unwell() -> None:
    assert verdicts([(10, UNWELL), (129, UNWELL), (131, UNWELL)], 120) == [False, False, True]
    assert verdicts([(10, UNWELL), (100, WELL), (131, UNWELL)], 120) == [False] * 3
    assert verdicts([(10, UNWELL), (1000, UNWELL)]) == [False, False]


def test_verdict_tells_why() -> None:
    watch = HealthWatch(0.0, 7.0, 120.0)
    assert watch.verdict(UNWELL, 1.0) is None
    assert watch.verdict(UNWELL, 200.0) == "answered GET /health with 503 for 199 s (engine core silent)"
    assert watch.verdict(None, 201.0) is None
    assert watch.verdict(None, 210.0) == "did not answer GET /health for 10 s"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", Answer(200)),
        (b'HTTP/1.1 503 No\r\n\r\n{"error": {"message": "loading"}}', Answer(503, "loading")),
        (b"HTTP/1.1 503 No\r\n\r\n<html>", Answer(503)),
        (b'HTTP/1.1 503 No\r\n\r\n["error"]', Answer(503)),
        (b"", None),
        (b"hello", None),
        (None, None),
    ],
)
def test_ask(sent: bytes | None, answer: Answer | None) -> None:
    async def script() -> Answer | None:
        done = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert (await reader.readline()) == b"GET /health HTTP/1.1\r\n"
            if sent is None:
                await done.wait()
            else:
                writer.write(sent)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            found = await ask(url, 0.3 if sent is None else 10.0)
            done.set()
        assert await ask(url, 10.0) is None  # nobody listens any more
        return found

    assert asyncio.run(script()) == answer


def test_announcements_are_lines_of_json() -> None:
    bound = Bound("http://127.0.0.1:1", "http://127.0.0.1:2", 1, 2)
    assert encode_announcement(bound).startswith(b'{"event":"bound","url":"http://127.0.0.1:1"')
    assert encode_announcement(Up()) == b'{"event":"ready"}\n'
    assert [decode_announcement(encode_announcement(one)) for one in (bound, Up())] == [bound, Up()]


def test_table() -> None:
    rows = [
        Row(0, "http://127.0.0.1:8000", "http://127.0.0.1:40001", 123, "log/log_0"),
        Row(1, "http://127.0.0.1:18002", "http://127.0.0.1:401", 1234567, "log/log_1"),
    ]
    assert table(rows) == [
        "rank  url                     metrics                         pid      logs",
        "0     http://127.0.0.1:8000   http://127.0.0.1:40001/metrics  123      log/log_0",
        "1     http://127.0.0.1:18002  http://127.0.0.1:401/metrics    1234567  log/log_1",
    ]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_report_without_a_terminal_says_now_and_then_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastdeploy")
    clock = Clock()
    report = StartReport(2, interactive=False, clock=clock)
    for clock.now_s in (1.0, 2.0, 16.0, 17.0):
        report.on_stage("server 0", "starting: weights 1 of 4 B")
    report.on_ready("server 0", "http://a")
    for clock.now_s in (20.0, 40.0):
        report.on_stage("server 1", "starting: weights 2 of 4 B")
    report.on_ready("server 1", "http://b")
    report.on_all_ready([Row(0, "http://a", "http://c", 1, "log")])
    assert caplog.messages == [
        "0 of 2 servers are ready after 16 s; server 0: weights 1 of 4 B",
        "server 0 is ready at http://a after 17.0 s",
        "1 of 2 servers are ready after 40 s; server 1: weights 2 of 4 B",
        "server 1 is ready at http://b after 40.0 s",
        "all 2 servers are ready after 40.0 s",
        "rank  url       metrics           pid  logs",
        "0     http://a  http://c/metrics  1    log",
    ]


def test_report_on_a_terminal_is_a_bar() -> None:
    terminal = io.StringIO()
    report = StartReport(2, stream=terminal, interactive=True)
    report.on_stage("server 1", "starting: weights")
    report.on_ready("server 1", "http://a")
    assert "server 1: weights" in terminal.getvalue() and "0/2" in terminal.getvalue()
    report.close()
    report.close()
