"""PagePool: every page is free, held or cached, and eviction takes what was released longest ago."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastdeploy.engine.pages import PagePool

pytestmark = pytest.mark.timeout(120)


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.n_free, pool.n_held, pool.n_cached


def cached_page(pool: PagePool, digest: bytes) -> int:
    (page,) = pool.allocate(1) or ()
    assert pool.label(page, digest)
    pool.release([page])
    return page


def test_allocate_gives_distinct_pages_all_or_none() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert pages is not None
    assert len(set(pages)) == 3
    assert pool.allocate(2) is None
    assert counts(pool) == (1, 3, 0)
    assert pool.allocate(0) == []
    assert pool.allocate(1) is not None
    assert counts(pool) == (0, 4, 0)


def test_page_without_content_is_free_after_release() -> None:
    pool = PagePool(2)
    pool.release(pool.allocate(2) or ())
    assert counts(pool) == (2, 0, 0)


def test_page_with_content_is_cached_until_needed() -> None:
    pool = PagePool(2)
    page = cached_page(pool, b"a")
    assert counts(pool) == (1, 0, 1)
    assert pool.find(b"a") == page
    assert page not in (pool.allocate(1) or ())  # free pages go first
    assert pool.find(b"a") == page
    assert pool.allocate(1) == [page]
    assert pool.find(b"a") is None
    assert counts(pool) == (0, 2, 0)


def test_holders_are_counted() -> None:
    pool = PagePool(2)
    page = cached_page(pool, b"a")
    assert pool.n_unheld([page]) == 1
    pool.hold([page])
    pool.hold([page])
    assert (pool.n_holders(page), pool.n_unheld([page])) == (2, 0)
    pool.release([page])
    assert counts(pool) == (1, 1, 0)
    pool.release([page])
    assert counts(pool) == (1, 0, 1)


def test_least_recently_released_goes_first() -> None:
    pool = PagePool(3)
    a, b, c = (pool.allocate(3)) or ()
    for page, digest in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.label(page, digest)
        pool.release([page])
    pool.hold([a])
    pool.release([a])
    assert [pool.allocate(1), pool.allocate(1), pool.allocate(1)] == [[b], [c], [a]]


def test_end_of_a_sequence_goes_before_its_beginning() -> None:
    pool = PagePool(3)
    pages = pool.allocate(3) or []
    for page, digest in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.label(page, digest)
    pool.release(pages)
    assert [pool.allocate(1) for _ in pages] == [[page] for page in reversed(pages)]


def test_second_page_with_the_same_content_stays_private() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2) or ()
    assert pool.label(first, b"a")
    assert not pool.label(second, b"a")
    pool.release([second])
    assert counts(pool) == (1, 1, 0)
    assert pool.find(b"a") == first


def test_check_finds_a_page_released_too_often() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1) or []
    pool.release(pages)
    pool.release(pages)
    with pytest.raises(AssertionError):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Requests that take, share, label and give back pages, against a plain model of who holds what."""

    N_PAGES = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.N_PAGES)
        self.holdings: list[list[int]] = []
        self.label_of: dict[int, bytes] = {}
        self.n_labels = 0

    @rule(n=st.integers(0, 8))
    def allocate(self, n: int) -> None:
        n_held = len({page for pages in self.holdings for page in pages})
        pages = self.pool.allocate(n)
        assert (pages is None) == (n > self.N_PAGES - n_held)
        if pages is not None:
            assert not {page for held in self.holdings for page in held} & set(pages)
            self.holdings.append(pages)
            for page in pages:
                self.label_of.pop(page, None)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def label(self, data: st.DataObject) -> None:
        for page in data.draw(st.sampled_from(self.holdings)):
            if page not in self.label_of:
                self.n_labels += 1
                self.label_of[page] = str(self.n_labels).encode()
                assert self.pool.label(page, self.label_of[page])

    @precondition(lambda self: self.label_of)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.label_of)))
        self.pool.hold([page])
        self.holdings.append([page])

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.holdings.pop(data.draw(st.integers(0, len(self.holdings) - 1)))
        self.pool.release(pages)

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        held = {page for pages in self.holdings for page in pages}
        assert self.pool.n_held == len(held)
        assert self.pool.n_cached == len(self.label_of.keys() - held)
        for page, digest in self.label_of.items():
            assert self.pool.find(digest) == page


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
