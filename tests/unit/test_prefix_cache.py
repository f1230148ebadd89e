"""PrefixCache: pages are found by their whole beginning, and only as many as leave a token to compute."""

import random

import pytest
from engine_sim import Engine, make_config, make_submit

from fastdeploy.engine.pages import PagePool
from fastdeploy.engine.prefix_cache import PageNames, PrefixCache

pytestmark = pytest.mark.timeout(120)


def filled(pool: PagePool, cache: PrefixCache, token_ids: list[int], page_tokens: int = 2) -> list[int]:
    """Compute and register a sequence, then let it end."""
    n_full = len(token_ids) // page_tokens
    pages = pool.allocate(n_full) or []
    cache.register(PageNames(token_ids, page_tokens), pages, 0, n_full)
    pool.release(pages)
    return pages


def test_finds_the_longest_common_beginning() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    pages = filled(pool, cache, [1, 2, 3, 4, 5, 6])
    assert cache.match(PageNames([1, 2, 3, 4, 9, 9, 9], 2), 7) == pages[:2]
    assert cache.match(PageNames([1, 2, 3, 4, 5, 6, 7], 2), 7) == pages
    assert cache.match(PageNames([3, 4, 5, 6, 7], 2), 5) == []  # same tokens, other beginning


@pytest.mark.parametrize(("n_tokens", "n_pages"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_leaves_the_last_token_to_compute(n_tokens: int, n_pages: int) -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    pages = filled(pool, cache, [1, 2, 3, 4, 5, 6])
    assert cache.match(PageNames([1, 2, 3, 4, 5, 6], 2), n_tokens) == pages[:n_pages]


def test_stops_at_a_page_that_was_evicted() -> None:
    pool = PagePool(3)
    cache = PrefixCache(pool, 2)
    pages = filled(pool, cache, [1, 2, 3, 4, 5, 6])
    pool.allocate(1)
    assert cache.match(PageNames([1, 2, 3, 4, 5, 6, 7], 2), 7) == pages[:2]


def test_names_do_not_depend_on_how_they_were_asked_for() -> None:
    token_ids = [random.Random(0).randrange(2**32) for _ in range(40)]
    grown: list[int] = []
    names = PageNames(grown, 4)
    for token_id in token_ids:
        grown.append(token_id)
        names.first(len(grown) // 4)
    assert names.first(10) == PageNames(token_ids, 4).first(10)
    assert len(set(names.first(10))) == 10


def test_names_of_unknown_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 pages of 4 tokens"):
        PageNames([1, 2, 3, 4, 5, 6, 7], 4).first(2)


def test_names_separate_token_boundaries() -> None:
    ids = [[1, 256], [257, 0], [0, 257], [256, 1], [1, 0], [0, 1], [65536, 0]]
    assert len({PageNames(token_ids, 2).first(1)[0] for token_ids in ids}) == len(ids)


def test_second_request_reuses_the_prompt() -> None:
    engine = Engine(make_config(page_tokens=4))
    prompt = list(range(10))
    engine.submit(make_submit("a", prompt))
    engine.run()
    engine.submit(make_submit("b", prompt))
    engine.run()
    assert engine.answers["a"].token_ids == engine.answers["b"].token_ids
    assert engine.answers["a"].deltas[0].n_cached_tokens == 0
    assert engine.answers["b"].deltas[0].n_cached_tokens == 8
    assert engine.plans[-4].plan.n_tokens == [2]
    assert engine.scheduler.status().n_cached_tokens_total == 8


@pytest.mark.parametrize(("output_caching", "n_cached"), [(True, 16), (False, 8)])
def test_output_is_reused_where_wanted(output_caching: bool, n_cached: int) -> None:
    engine = Engine(make_config(page_tokens=4, output_caching=output_caching))
    prompt = list(range(10))
    engine.submit(make_submit("a", prompt, max_tokens=9))
    engine.run()
    engine.submit(make_submit("b", [*prompt, *engine.answers["a"].token_ids]))
    engine.run()
    assert engine.answers["b"].deltas[0].n_cached_tokens == n_cached


def test_same_prompt_at_the_same_time_is_computed_twice() -> None:
    engine = Engine(make_config(page_tokens=4, n_pages=16))
    engine.submit(make_submit("a", range(9), max_tokens=2), make_submit("b", range(9), max_tokens=2))
    engine.run()
    assert [start.n_computed for start in engine.plans[0].plan.starts] == [0, 0]
    assert engine.answers["a"].token_ids == engine.answers["b"].token_ids
    assert engine.scheduler.pool.n_cached == 2  # one of the two copies


def test_uncommitted_pages_are_not_shared() -> None:
    engine = Engine(make_config(page_tokens=4, max_seqs=4), depth=2)
    engine.submit(make_submit("a", range(9)))
    engine.plan()
    engine.submit(make_submit("b", range(9)))
    planned = engine.plan()
    assert planned is not None
    assert [start.n_computed for start in planned.plan.starts] == [0]
    engine.run()


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine = Engine(make_config(prefix_caching=False))
    for name in "ab":
        engine.submit(make_submit(name, range(10)))
        engine.run()
    assert engine.answers["b"].deltas[0].n_cached_tokens == 0
    assert engine.scheduler.pool.n_free == 64


def test_prompt_logprobs_need_the_whole_prompt() -> None:
    engine = Engine(make_config())
    engine.submit(make_submit("a", range(10)))
    engine.run()
    engine.submit(make_submit("b", range(10), prompt_logprobs=1))
    engine.run()
    assert engine.answers["b"].deltas[0].n_cached_tokens == 0
