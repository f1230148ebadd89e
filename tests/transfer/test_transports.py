"""Pages of another process read by each transport: what arrives, what is refused, and what a fault leaves."""

from __future__ import annotations

import importlib.util
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import msgspec
import pytest
import torch
from owner import Owner, fill, layout_of

from fastdeploy.errors import (
    LayoutMismatch,
    PeerGone,
    PullTimeout,
    StalePages,
    TransferError,
    TransferUnavailable,
    WrongPages,
)
from fastdeploy.transfer.base import Endpoint, PageSet, Pull, Transport, make_transport
from fastdeploy.transfer.layout import PageLayout, source_ranks
from fastdeploy.transfer.memory import PageMemory, allocate_pages

pytestmark = pytest.mark.timeout(180)

CPU = torch.device("cpu")
LAYOUT = layout_of()
PATIENCE_S = 60.0
needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")
NAMES = ["shm", "tcp", pytest.param("nixl", marks=needs_nixl)]

StartOwner = Callable[..., Owner]


class Reader:
    """This process as a rank."""

    def __init__(self, name: str, layout: PageLayout = LAYOUT) -> None:
        self.memory = allocate_pages(layout, CPU, "reader", shared=True)
        self.transport: Transport = make_transport(name, self.memory, "reader", "127.0.0.1")

    def wait(self, pull: Pull) -> None:
        until = time.monotonic() + PATIENCE_S
        while self.transport.poll(pull) == "pending":
            assert time.monotonic() < until
            time.sleep(0.001)

    def read(
        self, endpoint: Endpoint, source: PageSet, page_ids: Sequence[int], deadline_s: float = PATIENCE_S
    ) -> None:
        self.wait(self.transport.pull(self.transport.connect(endpoint), source, page_ids, deadline_s))

    def close(self) -> None:
        self.transport.close()
        self.memory.close()


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def owner(name: str) -> Iterator[Owner]:
    """One whose pages nobody spoils."""
    process = Owner(LAYOUT, [name], owner="shared")
    yield process
    process.close()


@pytest.fixture
def start_owner(name: str) -> Iterator[StartOwner]:
    with ExitStack() as stack:

        def start(layout: PageLayout = LAYOUT, owner: str = "one", **given: object) -> Owner:
            process = Owner(layout, [name], owner=owner, **given)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture
def reader(name: str) -> Iterator[Reader]:
    rank = Reader(name)
    yield rank
    rank.close()


def filled(layout: PageLayout = LAYOUT, seed: int = 1) -> PageMemory:
    memory = allocate_pages(layout, CPU, "expected", shared=False)
    fill(memory, seed)
    return memory


def check_pages(
    found: PageMemory, here: Sequence[int], there: Sequence[int], layers: Sequence[int] = (0, 1, 2)
) -> None:
    """Pages `here` are the owner's pages `there`, and nothing else was written."""
    expected = torch.zeros_like(found.pages)
    for layer in layers:
        expected[layer, list(here)] = filled(found.layout).pages[layer, list(there)]
    assert torch.equal(found.pages, expected)


@pytest.mark.parametrize("n_pages", [0, 1, 2, 7, 33])
def test_pages_arrive_where_they_shall(owner: Owner, reader: Reader, n_pages: int) -> None:
    random.seed(n_pages)
    there, here = random.sample(range(40), n_pages), random.sample(range(40), n_pages)
    reader.read(owner.endpoint, owner.offer(there), here)
    check_pages(reader.memory, here, there)


def test_runs_of_neighbours_in_any_order(owner: Owner, reader: Reader) -> None:
    there, here = [0, 1, 2, 3, 9, 8, 7, 39], [5, 6, 7, 8, 20, 21, 22, 23]
    reader.read(owner.endpoint, owner.offer(there), here)
    check_pages(reader.memory, here, there)


def test_layer_by_layer(owner: Owner, reader: Reader) -> None:
    peer = reader.transport.connect(owner.endpoint)
    pulls = [
        reader.transport.pull(peer, owner.offer([4, 6], first_layer=layer, n_layers=1), [8, 9], PATIENCE_S)
        for layer in (0, 2)
    ]
    for pull in pulls:
        reader.wait(pull)
        reader.wait(pull)  # asking again changes nothing
    check_pages(reader.memory, [8, 9], [4, 6], layers=(0, 2))


def test_many_at_once(owner: Owner, reader: Reader) -> None:
    peer = reader.transport.connect(owner.endpoint)
    pages = list(range(40))
    random.seed(0)
    random.shuffle(pages)
    pulls = []
    for page in range(40):
        for layer in range(3):
            source = owner.offer([pages[page]], request_id=f"r{page}", first_layer=layer, n_layers=1)
            pulls.append(reader.transport.pull(peer, source, [page], PATIENCE_S))
    for pull in pulls:
        reader.wait(pull)
    check_pages(reader.memory, range(40), pages)


@pytest.mark.parametrize(("n_owners", "n_readers"), [(1, 2), (2, 1)])
def test_tensor_parallelism_may_differ(name: str, n_owners: int, n_readers: int, start_owner: StartOwner) -> None:
    owners = [start_owner(layout_of(rank, n_owners), owner=f"o{rank}") for rank in range(n_owners)]
    endpoints = [owner.endpoint for owner in owners]
    for rank in range(n_readers):
        reader = Reader(name, layout_of(rank, n_readers))
        for index in source_ranks(reader.memory.layout, [endpoint.layout for endpoint in endpoints]):
            reader.read(endpoints[index], owners[index].offer([7, 30, 8]), [0, 39, 5])
        check_pages(reader.memory, [0, 39, 5], [7, 30, 8])
        reader.close()


def test_a_changed_page_is_noticed_and_can_be_read_again(start_owner: StartOwner, reader: Reader) -> None:
    owner = start_owner()
    before = owner.offer([3, 4, 5])
    owner.spoil(layer=1, page=4)
    with pytest.raises(WrongPages, match=r"request r .*layer 1, page 4, head 3: check value \w{16}, offered \w{16}"):
        reader.read(owner.endpoint, before, [0, 1, 2])
    owner.spoil(layer=1, page=4)  # as it was
    reader.read(owner.endpoint, before, [0, 1, 2])
    check_pages(reader.memory, [0, 1, 2], [3, 4, 5])


def test_wrong_checks_of_another_page(owner: Owner, reader: Reader) -> None:
    source, other = owner.offer([1, 2]), owner.offer([2, 1])
    with pytest.raises(WrongPages, match="layer 0, page 1, head 0"):
        reader.read(owner.endpoint, msgspec.structs.replace(source, checks=other.checks), [0, 1])


def test_what_was_read_is_not_read_again(owner: Owner, reader: Reader) -> None:
    source = owner.offer([1, 2], generation=5)
    reader.read(owner.endpoint, source, [3, 4])
    with pytest.raises(StalePages, match="was read already"):
        reader.read(owner.endpoint, source, [3, 4])
    with pytest.raises(StalePages, match="generation 4, the newest is 5"):
        reader.read(owner.endpoint, owner.offer([1, 2], generation=4), [3, 4])
    reader.read(owner.endpoint, owner.offer([1, 2], generation=6), [3, 4])
    reader.transport.forget("r")
    reader.read(owner.endpoint, source, [3, 4])


def test_a_dead_owner(name: str, start_owner: StartOwner, reader: Reader) -> None:
    """For who had read from it and for who comes only now."""
    owner = start_owner()
    source, other = owner.offer([1]), owner.offer([2], request_id="other")
    reader.read(owner.endpoint, source, [1])
    owner.kill()
    fresh = Reader(name)
    for rank in (reader, fresh):
        with pytest.raises((PeerGone, PullTimeout)):
            rank.read(owner.endpoint, other, [2], deadline_s=10)
    fresh.close()


def test_killed_while_it_is_read(name: str, start_owner: StartOwner) -> None:
    """What is read by then is right, or the pull fails; nothing writes afterwards."""
    layout = layout_of(page_tokens=512, head_dim=128, n_pages=30)  # 1 MiB a page
    owner, reader = start_owner(layout), Reader(name, layout)
    peer = reader.transport.connect(owner.endpoint)
    sources = [owner.offer(range(30), request_id=f"r{layer}", first_layer=layer, n_layers=1) for layer in range(3)]
    pulls = [reader.transport.pull(peer, source, range(30), 20.0) for source in sources]
    owner.kill()
    for layer, pull in enumerate(pulls):
        try:
            reader.wait(pull)
        except (PeerGone, PullTimeout):
            continue
        assert torch.equal(reader.memory.pages[layer], filled(layout).pages[layer])
    before = reader.memory.pages.clone()
    time.sleep(0.2)
    assert torch.equal(reader.memory.pages, before)
    reader.close()


def test_another_process_in_its_place(name: str, start_owner: StartOwner, reader: Reader) -> None:
    """Same process number and descriptor, or same port; another owner."""
    owner = start_owner()
    source = owner.offer([1])
    stale = msgspec.structs.replace(owner.endpoint, owner="before")
    if name == "tcp":  # an address tells the owner by its key
        host, port, key = msgspec.msgpack.decode(owner.endpoint.transports[name])
        stale = msgspec.structs.replace(stale, transports={name: msgspec.msgpack.encode((host, port, bytes(len(key))))})
    with pytest.raises(PeerGone):
        reader.read(stale, msgspec.structs.replace(source, owner="before"), [1])
    with pytest.raises(StalePages, match="offered by before"):
        reader.read(owner.endpoint, msgspec.structs.replace(source, owner="before"), [1])
    reader.read(owner.endpoint, source, [1])


def test_a_stopped_owner(name: str, start_owner: StartOwner, reader: Reader) -> None:
    """Its memory can be read without it; a network needs it, and then the deadline ends the pull."""
    owner = start_owner()
    first, second, third = (owner.offer([page], request_id=f"r{page}") for page in (1, 2, 3))
    reader.read(owner.endpoint, first, [1])
    owner.stop()
    if name == "shm":
        reader.read(owner.endpoint, second, [2], deadline_s=5)
    else:
        started = time.monotonic()
        with pytest.raises(PullTimeout, match=r"1 pages of request r2 from 127\.0\.0\.1 did not come within 0\.5 s"):
            reader.read(owner.endpoint, second, [2], deadline_s=0.5)
        assert time.monotonic() - started < 10
    pull = reader.transport.pull(reader.transport.connect(owner.endpoint), third, [3], PATIENCE_S)
    started = time.monotonic()
    reader.transport.cancel(pull)
    assert time.monotonic() - started < 10
    before = reader.memory.pages.clone()
    owner.go_on()
    time.sleep(0.3)
    assert torch.equal(reader.memory.pages, before)
    reader.transport.forget("r2")
    reader.read(owner.endpoint, second, [4])
    assert torch.equal(reader.memory.pages[:, 4], filled().pages[:, 2])


def test_disconnected_peers(owner: Owner, reader: Reader) -> None:
    source = owner.offer([1])
    peer = reader.transport.connect(owner.endpoint)
    reader.transport.disconnect(peer)
    with pytest.raises(TransferError):
        reader.wait(reader.transport.pull(peer, source, [1], PATIENCE_S))
    reader.read(owner.endpoint, source, [1])
    check_pages(reader.memory, [1], [1])


def test_another_layout_is_refused(name: str, start_owner: StartOwner) -> None:
    owner, reader = start_owner(), Reader(name, layout_of(page_tokens=32))
    with pytest.raises(LayoutMismatch, match="page_tokens: 32 here, 16 at the peer"):
        reader.transport.connect(owner.endpoint)
    reader.close()


def test_an_endpoint_without_this_protocol(owner: Owner, reader: Reader) -> None:
    with pytest.raises(TransferUnavailable, match=r"127\.0\.0\.1 offers no address"):
        reader.transport.connect(msgspec.structs.replace(owner.endpoint, owner="new", transports={}))


def test_tcp_serves_nobody_without_the_key_and_refuses_what_it_does_not_have() -> None:
    from fastdeploy.transfer.tcp_wire import (
        HandshakeError,
        ReadRequest,
        prove_as_client,
        receive_status,
        send_request,
    )

    rank = Reader("tcp")
    host, port, key = msgspec.msgpack.decode(rank.transport.offer())
    with socket.create_connection((host, port), timeout=PATIENCE_S) as connection, pytest.raises((EOFError, OSError)):
        prove_as_client(connection, bytes(32))
    with socket.create_connection((host, port), timeout=PATIENCE_S) as connection:
        prove_as_client(connection, key)
        for request in (
            ReadRequest([40], 0, 1, 0, 1),
            ReadRequest([-1], 0, 1, 0, 1),
            ReadRequest([0], 2, 2, 0, 1),
            ReadRequest([0], 0, 1, 3, 2),
        ):
            send_request(connection, request)
            assert receive_status(connection)
        connection.sendall((1 << 30).to_bytes(4, "little"))
        assert connection.recv(1) == b""
    rank.close()
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        accepted = impostor.getsockname()[1]
        with socket.create_connection(("127.0.0.1", accepted), timeout=PATIENCE_S) as connection:
            other, _ = impostor.accept()
            with other:
                other.sendall(bytes(64))
                with pytest.raises(HandshakeError):
                    prove_as_client(connection, key)
