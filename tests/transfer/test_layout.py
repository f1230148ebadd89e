"""Which heads of which ranks are read, and which protocol is chosen."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from owner import layout_of

from fastdeploy.errors import ConfigError, LayoutMismatch, TransferUnavailable
from fastdeploy.transfer.base import Endpoint
from fastdeploy.transfer.choose import choose, offered_names, parse_protocols
from fastdeploy.transfer.layout import PageLayout, SharedHeads, shared_heads, source_ranks


def ranks(n: int) -> list[PageLayout]:
    return [layout_of(rank, n) for rank in range(n)]


@pytest.mark.parametrize("n_sources", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("n_readers", [1, 2, 4, 8, 16])
def test_every_head_is_read_exactly_once(n_sources: int, n_readers: int) -> None:
    """Of four heads; with more ranks than heads there are copies."""
    used = set()
    for mine in ranks(n_readers):
        read = []
        for index in source_ranks(mine, ranks(n_sources)):
            theirs = ranks(n_sources)[index]
            first_mine, first_theirs, n_heads = shared_heads(mine, theirs)
            assert mine.first_kv_head + first_mine == theirs.first_kv_head + first_theirs
            assert first_mine + n_heads <= mine.n_kv_heads
            assert first_theirs + n_heads <= theirs.n_kv_heads
            read += range(first_mine, first_mine + n_heads)
            used.add(index)
        assert sorted(read) == list(range(mine.n_kv_heads))
    assert len(used) == min(n_sources, max(4, n_readers))  # copies share the work


def test_part_of_a_page() -> None:
    mine, theirs = layout_of(1, 4), layout_of(0, 2)
    assert shared_heads(mine, theirs) == SharedHeads(first_mine=0, first_theirs=1, n_heads=1)
    with pytest.raises(LayoutMismatch, match="tensor rank 1 of 2 holds none of the key heads of tensor rank 0 of 4"):
        shared_heads(layout_of(0, 4), layout_of(1, 2))
    with pytest.raises(LayoutMismatch, match=r"no tensor rank of the peer holds the key heads \[2, 3\]"):
        source_ranks(layout_of(), ranks(2)[:1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layers", 2), ("page_tokens", 8), ("head_dim", 16), ("dtype", "bfloat16"), ("total_kv_heads", 5)],
)
def test_what_must_be_equal(field: str, value: object) -> None:
    other = layout_of(**{field: value})
    with pytest.raises(LayoutMismatch, match=f"differ in {field}: "):
        shared_heads(layout_of(), other)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "int3"}, "dtype int3"),
        ({"n_pages": 0}, "n_pages 0: must be at least 1"),
        ({"first_kv_head": 1}, "first_kv_head 1: with 4 heads here it must be from 0 to 0"),
        ({"page_tokens": 1, "head_dim": 3}, "must be a multiple of 8"),
    ],
)
def test_layouts_that_cannot_be(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        layout_of(**changes)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert([*msgspec.to_builtins(layout_of())[:-1], 0], PageLayout)


def endpoint(machine: str, *names: str) -> Endpoint:
    return Endpoint("o", "10.0.0.7", machine, "cpu", layout_of(), dict.fromkeys(names, b""))


def test_memory_of_the_same_machine_first_then_rdma_then_tcp() -> None:
    me = endpoint("a", "shm", "nixl", "tcp")
    both = parse_protocols("rdma,ipc")
    assert choose(both, me, endpoint("a", "shm", "nixl", "tcp")) == "shm"
    assert choose(both, me, endpoint("b", "shm", "nixl", "tcp")) == "nixl"
    assert choose(both, me, endpoint("b", "shm", "tcp")) == "tcp"
    assert choose(parse_protocols("rdma"), me, endpoint("a", "shm", "tcp")) == "tcp"
    gpu = endpoint("a", "cuda_ipc", "nixl")
    assert choose(both, gpu, endpoint("a", "cuda_ipc", "nixl")) == "cuda_ipc"
    assert choose(both, gpu, endpoint("b", "cuda_ipc", "nixl")) == "nixl"
    with pytest.raises(TransferUnavailable, match=r"10\.0\.0\.7 \(on another machine\).*add rdma to --cache-transfer"):
        choose(parse_protocols("ipc"), me, endpoint("b", "shm", "tcp"))


def test_what_a_rank_offers() -> None:
    assert offered_names(("ipc", "rdma"), "cpu", has_nixl=False) == ["shm", "tcp"]
    assert offered_names(("ipc", "rdma"), "cpu", has_nixl=True) == ["shm", "nixl", "tcp"]
    assert offered_names(("rdma", "ipc"), "cuda", has_nixl=True) == ["cuda_ipc", "nixl"]
    assert offered_names(("rdma",), "cuda", has_nixl=False) == []


@pytest.mark.parametrize("flag", ["", "rdma,", "tcp", "ipc;rdma", "RDMA"])
def test_protocols_of_the_flag(flag: str) -> None:
    if flag == "rdma,":
        assert parse_protocols(flag) == ("rdma",)
        return
    with pytest.raises(ConfigError, match="--cache-transfer-protocol"):
        parse_protocols(flag)
