"""The choices of the router's policies over made-up loads, the counts behind them, and what is read from a prompt."""

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.errors import ConfigError
from fastdeploy.router.health import figures_of
from fastdeploy.router.ledger import Ledger, RemoteFigures, ServerLoad, Ticket
from fastdeploy.router.policies import POLICIES, Ask, Policy, SchedulerSettings, make_policy
from fastdeploy.router.prefix_index import PrefixIndex
from fastdeploy.router.prompt_text import MAX_PARSED_BYTES, PromptReader

pytestmark = pytest.mark.timeout(60)


def loads_of(*n_requests: int, **fields: Any) -> list[ServerLoad]:
    return [ServerLoad(f"http://s{i}", i, n, **fields) for i, n in enumerate(n_requests)]


def policy(name: str, **settings: Any) -> Policy:
    return make_policy(SchedulerSettings(**settings), name, random.Random(1))


def ask(text: str = "", now_s: float = 0.0) -> Ask:
    return Ask(2 * len(text), text, now_s)


def picks(chooser: Policy, loads: list[ServerLoad], n: int) -> Counter[int]:
    return Counter(chooser.pick(loads, ask()) for _ in range(n))


def test_random_and_round_robin_are_even() -> None:
    assert picks(policy("round_robin"), loads_of(9, 0, 0), 30) == {0: 10, 1: 10, 2: 10}
    drawn = picks(policy("random"), loads_of(9, 0, 0), 3000)
    assert all(850 < drawn[i] < 1150 for i in range(3))


def test_power_of_two_never_takes_the_worst() -> None:
    drawn = picks(policy("power_of_two"), loads_of(1, 5, 3), 600)
    assert drawn[1] == 0
    assert drawn[0] > drawn[2] > 100
    assert policy("power_of_two").pick(loads_of(4), ask()) == 0


@pytest.mark.parametrize(
    ("name", "figures", "expected"),
    [
        ("request_num", [(3, 0, 0), (1, 0, 99), (2, 0, 0)], 1),
        ("process_tokens", [(1, 0, 50), (9, 0, 20), (1, 0, 30)], 1),
        ("fd_metrics_score", [(4, 0, 0), (3, 2, 0), (5, 0, 0)], 0),  # running + 10 * waiting: 4, 21, 5
        ("request_num", [(2, 0, 0), (2, 0, 0)], 0),  # equal: the lowest URL
    ],
)
def test_the_smallest_figure_wins(name: str, figures: list[tuple[int, int, int]], expected: int) -> None:
    loads = [ServerLoad(f"http://s{i}", i, *figure) for i, figure in enumerate(figures)]
    assert policy(name, waiting_weight=10).pick(loads, ask()) == expected


def test_remote_figures_count_what_was_sent_since() -> None:
    chooser = policy("fd_remote_metrics_score", waiting_weight=10)
    assert chooser.needs_remote
    loads = loads_of(4, 4)
    loads[0].remote = RemoteFigures(n_running=2, n_waiting=0, n_requests_then=4)
    loads[1].remote = RemoteFigures(n_running=5, n_waiting=0, n_requests_then=4)
    chosen = []
    for _ in range(8):
        chosen.append(chooser.pick(loads, ask()))
        Ticket(loads[chosen[-1]], 1, False)
    assert chosen == [0, 0, 0, 0, 1, 0, 1, 0], "all go to one server until the next look at its figures"
    loads[1].remote = None
    assert chooser.pick(loads, ask()) == 1, "its own count, 6, is used for a server without figures"


def test_cache_aware_goes_where_the_prompt_has_been() -> None:
    chooser = policy("cache_aware", cache_block_size=4)
    loads = loads_of(0, 0, 0)
    first = {text: chooser.pick(loads, ask(text * 10)) for text in ("aaaa", "bbbb", "cccc")}
    assert set(first.values()) == {0}, "without load or hits, the first"
    loads[0].n_requests, loads[0].n_tokens = 1, 80
    assert chooser.pick(loads, ask("dddd" * 10)) == 1
    assert chooser.pick(loads, ask("dddd" * 10 + "tail")) == 1
    assert chooser.pick(loads, ask("aaaa" * 10)) == 1, "a whole hit and a whole load are equal: fewer tokens win"
    loads[0].n_requests = 0
    assert chooser.pick(loads, ask("cccc" * 10)) == 0


def test_cache_aware_balances_when_loads_are_far_apart() -> None:
    chooser = policy("cache_aware", cache_block_size=4, balance_abs_threshold=3, balance_rel_threshold=0.5)
    loads = loads_of(0, 0)
    assert chooser.pick(loads, ask("aaaa" * 10)) == 0
    loads[0].n_requests, loads[0].n_tokens = 4, 400
    assert chooser.pick(loads, ask("aaaa" * 10)) == 1, "4 - 0 > 3"
    loads[1].n_requests, loads[1].n_tokens = 1, 500
    light = policy("cache_aware", cache_block_size=4, load_balance_weight=0.05, balance_abs_threshold=3)
    assert light.pick(loads, ask("zzzz" * 10)) == 1
    assert light.pick(loads, ask("zzzz" * 10)) == 1


def test_cache_aware_forgets_a_server_that_was_away() -> None:
    ledger = Ledger()
    loads = [ledger.joined("http://a"), ledger.joined("http://b")]
    chooser = policy("cache_aware", cache_block_size=4, load_balance_weight=0.1)
    loads[0].n_requests = 1
    assert chooser.pick(loads, ask("aaaa" * 10)) == 1
    loads[1].n_requests = 2
    assert chooser.pick(loads, ask("aaaa" * 10)) == 1
    ledger.joined("http://b")
    assert chooser.pick(loads, ask("aaaa" * 10)) == 0, "it came back with an empty cache"


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'least' is none of random, round_robin"):
        policy("least")
    assert {"remote_cache_aware", "fd_remote_metrics_score"} < set(POLICIES)


def test_prefix_index_matches_beginnings_only() -> None:
    index = PrefixIndex(4, idle_s=10)
    assert index.keys("abc") == []
    index.record(index.keys("aaaabbbbcccc"), 1, 0.0)
    index.record(index.keys("aaaabbbb"), 2, 0.0)
    assert index.match(index.keys("aaaabbbbccccdddd"), {1, 2, 3}) == {1: 3, 2: 2}
    assert index.match(index.keys("bbbbcccc"), {1, 2}) == {}
    assert index.match(index.keys("aaaabbbbcccc"), {2}) == {2: 2}


def test_prefix_index_is_bounded_and_forgets() -> None:
    index = PrefixIndex(2, idle_s=10, max_nodes=8)
    for i in range(20):
        index.record(index.keys(f"p{i:02}q"), i, float(i))
    assert len(index) == 8
    assert index.match(index.keys("p19q"), {19}) == {19: 2}
    assert index.evict(28.5) == 6
    assert index.evict(100.0) == 2
    assert len(index) == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 500), st.booleans(), st.integers(0, 5)), max_size=30))
def test_the_ledger_returns_to_zero(requests: list[tuple[int, int, bool, int]]) -> None:
    loads = loads_of(0, 0, 0)
    tickets = []
    for i, n_tokens, is_stream, n_events in requests:
        ticket = Ticket(loads[i], n_tokens, is_stream)
        if n_events:
            ticket.events(n_events)
        tickets.append(ticket)
    assert sum(load.n_requests for load in loads) == len(requests)
    assert sum(load.n_waiting for load in loads) == sum(stream and not n for _, _, stream, n in requests)
    assert sum(load.n_tokens for load in loads) == sum(n + events for _, n, _, events in requests)
    for ticket in [*tickets, *tickets]:
        ticket.end()
    assert all((load.n_requests, load.n_waiting, load.n_tokens) == (0, 0, 0) for load in loads)


def test_loads_outlive_their_server_while_requests_do() -> None:
    ledger = Ledger()
    load = ledger.joined("http://a")
    ticket = Ticket(load, 5, False)
    ledger.forget_idle(set())
    assert ledger.joined("http://a") is load
    ticket.end()
    ledger.forget_idle(set())
    assert ledger.joined("http://a") is not load


@pytest.mark.parametrize(
    ("body", "n_tokens", "text"),
    [
        ({"prompt": " hello "}, 10, "hello"),
        ({"prompt": ["ab", "cd"]}, 10, "ab cd"),
        ({"prompt": [1, 2, 3]}, 3, "\x01\x02\x03"),
        ({"prompt": [[1, 2], [3]]}, 3, "\x01\x02\x03"),
        ({"messages": [{"role": "user", "content": "ab"}, {"content": [{"type": "text", "text": "c"}]}]}, 8, "ab c"),
        ({"messages": [{"role": "user", "content": None}]}, 0, ""),
        ({"messages": [5, 6]}, 2, "\x05\x06"),
        ({"messages": [], "prompt_token_ids": [7] * 9}, 9, "\x07" * 9),
        ({"prompt": {"a": 1}, "messages": None}, 0, ""),
    ],
)
def test_figures_of_a_prompt(body: dict[str, Any], n_tokens: int, text: str) -> None:
    for wants_text in (False, True):
        figures = PromptReader(wants_text).read(json.dumps(body).encode())
        assert figures.n_tokens == n_tokens
        assert figures.text == (text if wants_text else "")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"messages": 5}', b"\xff", b"[" * 5000])
def test_a_body_that_cannot_be_read_is_estimated(body: bytes) -> None:
    assert PromptReader(True).read(body).n_tokens == 2 * len(body)


def test_streams_are_recognised_and_huge_bodies_not_parsed() -> None:
    reader = PromptReader(True)
    assert reader.read(b'{"prompt": "a", "stream": true}').is_stream
    assert not reader.read(b'{"prompt": "a"}').is_stream
    assert reader.read(b" " * (MAX_PARSED_BYTES + 1)).text == ""


def test_figures_in_a_page_of_metrics() -> None:
    page = b"# x\nfastdeploy:num_requests_running 3.0\nfastdeploy:num_requests_waiting 1.0\n"
    assert figures_of(page, 5) == RemoteFigures(3, 1, 5)
    assert figures_of(page.replace(b"3.0", b"NaN"), 5) is None
    assert figures_of(b"fastdeploy:num_requests_running 3.0\n", 5) is None
