"""The books on what each data-parallel rank has to do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.frontend.ledger import RankLoad, balance_ratio, least_loaded
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Submit, TokenDelta

LIMITS = {"max_seqs": 8, "max_batched_tokens": 256, "n_cache_tokens": 4096}


def submit(request_id: str, n_prompt: int) -> Submit:
    return Submit(request_id, [1] * n_prompt, SamplingParams(), 0.0)


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


@given(st.integers(2, 8), st.lists(st.integers(1, 200), min_size=1, max_size=100))
def test_a_burst_does_not_pile_up(n_ranks: int, prompts: list[int]) -> None:
    loads = [RankLoad() for _ in range(n_ranks)]
    for i, n_prompt in enumerate(prompts):
        loads[least_loaded(loads, **LIMITS)].add(submit(str(i), n_prompt))
    equal = [RankLoad() for _ in range(n_ranks)]
    for i in range(len(prompts)):
        equal[least_loaded(equal, **LIMITS)].add(submit(str(i), 50))
    counts = [load.n_requests for load in equal]
    assert max(counts) - min(counts) <= 1
    # Whoever got the last request had no more than the least of the others, so ranks differ by one request at most.
    shares = [load.n_requests / 8 + load.n_waiting_tokens / 256 + load.n_tokens / 4096 for load in loads]
    largest = max(1 / 8 + n / 256 + n / 4096 for n in prompts)
    assert max(shares) - min(shares) <= largest + 1e-9


def test_balance_ratio() -> None:
    loads = [RankLoad(), RankLoad()]
    assert balance_ratio(loads) == 1.0
    loads[0].add(submit("a", 10))
    assert balance_ratio(loads) == 0.5
    loads[1].add(submit("b", 10))
    assert balance_ratio(loads) == 1.0
