"""The books on what each data-parallel rank has to do."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.frontend.ledger import RankLoad, balance_ratio, least_loaded
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Submit, TokenDelta

LIMITS = {"max_seqs": 8, "max_batched_tokens": 256, "n_cache_tokens": 4096}


def submit(request_id: str, n_prompt: int, max_tokens: int | None = 20) -> Submit:
    return Submit(request_id, [1] * n_prompt, SamplingParams(max_tokens=max_tokens), 0.0)


def test_the_life_of_a_request() -> None:
    load = RankLoad()
    load.add(submit("a", 10))
    load.add(submit("b", 5))
    assert (load.n_requests, load.n_waiting_tokens, load.n_running_tokens, load.n_tokens) == (2, 15, 0, 15)
    load.take(TokenDelta("a", [7]))
    assert (load.n_requests, load.n_waiting_tokens, load.n_running_tokens) == (2, 5, 11)
    load.take(TokenDelta("a", [7, 8], "stop"))
    assert (load.n_requests, load.n_waiting_tokens, load.n_running_tokens) == (1, 5, 0)
    assert load.drop("b") == submit("b", 5)
    assert (load.n_requests, load.n_tokens) == (0, 0)
    load.take(TokenDelta("b", [1]))  # on its way when it was dropped
    assert load.drop("b") is None and load.n_tokens == 0


def test_what_is_still_expected() -> None:
    load = RankLoad()
    load.add(submit("a", 10, 3))
    load.add(submit("endless", 10, None))
    load.add(submit("capped", 10, 100_000))
    assert load.n_output_tokens_left == 3 + 512 + 512
    load.take(TokenDelta("a", [7, 7]))
    assert load.n_output_tokens_left == 1 + 512 + 512
    load.take(TokenDelta("endless", [7] * 600))  # more than expected
    assert load.n_output_tokens_left == 1 + 512
    load.drop("capped")
    load.take(TokenDelta("a", [], "stop"))
    assert load.n_output_tokens_left == 0 and load.n_requests == 1


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3), st.integers(0, 9)), max_size=60))
def test_the_books_agree_with_a_count_from_scratch(events: list[tuple[str, int, int]]) -> None:
    load = RankLoad()
    alive: dict[str, tuple[int, int]] = {}  # prompt, output
    for name, what, n in events:
        if what == 0 and name not in alive:
            load.add(submit(name, n))
            alive[name] = (n, -1)
        elif what in (1, 2):
            ends = what == 2
            load.take(TokenDelta(name, [1] * n, "stop" if ends else None))
            if name in alive:
                prompt, output = alive[name]
                alive[name] = (prompt, max(output, 0) + n)
                if ends:
                    del alive[name]
        elif what == 3:
            load.drop(name)
            alive.pop(name, None)
        assert load.n_requests == len(alive)
        assert load.n_waiting_tokens == sum(p for p, o in alive.values() if o < 0)
        assert load.n_running_tokens == sum(p + o for p, o in alive.values() if o >= 0)
        assert load.n_output_tokens_left == sum(max(20 - max(o, 0), 0) for _, o in alive.values())


def place(loads: list[RankLoad], request: Submit) -> int:
    """Where the request went."""
    i = least_loaded(loads, request, **LIMITS)
    loads[i].add(request)
    return i


@given(st.integers(2, 8), st.integers(1, 300), st.integers(1, 1000), st.integers(1, 100))
def test_equal_requests_are_dealt_out(n_ranks: int, n_prompt: int, max_tokens: int, n_requests: int) -> None:
    loads = [RankLoad() for _ in range(n_ranks)]
    for i in range(n_requests):
        place(loads, submit(str(i), n_prompt, max_tokens))
    counts = [load.n_requests for load in loads]
    assert max(counts) - min(counts) <= 1


@given(st.integers(2, 8), st.lists(st.integers(1, 200), min_size=1, max_size=100))
def test_a_burst_does_not_pile_up(n_ranks: int, prompts: list[int]) -> None:
    """Nowhere is more of it than half above the mean, but for one request: whatever its lengths."""
    loads = [RankLoad() for _ in range(n_ranks)]
    for i, n_prompt in enumerate(prompts):
        place(loads, submit(str(i), n_prompt))
    assert max(load.n_requests for load in loads) <= 1.5 * len(prompts) / n_ranks + 1
    assert max(load.n_waiting_tokens for load in loads) <= 1.5 * sum(prompts) / n_ranks + max(prompts)


def test_each_kind_of_load_is_evened_out() -> None:
    loads = [RankLoad(), RankLoad()]
    assert place(loads, submit("long prompt", 200, 10)) == 0
    assert place(loads, submit("long answer", 10, 200)) == 1
    assert place(loads, submit("another long prompt", 200, 10)) == 1
    assert place(loads, submit("another long answer", 10, 200)) == 0


def test_a_full_cache_keeps_requests_away() -> None:
    loads = [RankLoad(), RankLoad()]
    loads[0].add(submit("long", 2000))
    loads[0].take(TokenDelta("long", [1]))
    loads[1].add(submit("short", 1))
    loads[1].take(TokenDelta("short", [1]))
    assert place(loads, submit("next", 400)) == 1


def steps_of_a_group(requests_d: list[list[tuple[int, int]]], budget: int = 256) -> float:
    """What it costs to serve requests (prompt, output) on ranks that wait for each other in every step."""
    left_d = [[[prompt, output] for prompt, output in requests] for requests in requests_d]
    cost = 0.0
    while any(left_d):
        costs = []
        for left in left_d:
            room, rows = budget, 0
            for request in left:
                n = min(request[0], room) if request[0] else 1
                rows, room = rows + n, room - n
                request[0] -= n if request[0] else 0
                request[1] -= not request[0]
            left[:] = [request for request in left if request[1] > 0]
            costs.append(4.0 + rows if left or rows else 0.0)
        cost += max(costs)
    return cost


def test_ranks_of_a_group_wait_less_than_with_requests_in_turn() -> None:
    """Simulated: the sum over many bursts of mixed lengths, longest answers first as `LLM.generate` gives them."""
    dice = random.Random(0)
    in_turn, placed = 0.0, 0.0
    for n_ranks in (2, 4, 8):
        for _ in range(6):
            burst = [(dice.randint(16, 256), dice.randint(16, 128)) for _ in range(12 * n_ranks)]
            in_turn += steps_of_a_group([burst[d::n_ranks] for d in range(n_ranks)])
            loads = [RankLoad() for _ in range(n_ranks)]
            requests_d: list[list[tuple[int, int]]] = [[] for _ in range(n_ranks)]
            for i, request in enumerate(sorted(burst, key=lambda request: -request[1])):
                requests_d[place(loads, submit(str(i), *request))].append(request)
            placed += steps_of_a_group(requests_d)
    assert placed < 0.95 * in_turn


def test_balance_ratio() -> None:
    loads = [RankLoad(), RankLoad()]
    assert balance_ratio(loads) == 1.0
    loads[0].add(submit("a", 10))
    assert balance_ratio(loads) == 0.5
    loads[1].add(submit("b", 10))
    assert balance_ratio(loads) == 1.0
