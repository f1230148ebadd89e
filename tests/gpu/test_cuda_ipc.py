"""Pages of another process's GPU read through CUDA IPC: what arrives, what is noticed, and a pair of servers."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from processes import API_SERVER, PATIENCE_S, Process, wait_for

from fastdeploy.errors import PeerGone, TransferUnavailable, WrongPages
from fastdeploy.transfer.base import make_transport
from fastdeploy.transfer.layout import PageLayout, source_ranks
from fastdeploy.transfer.memory import PageMemory, allocate_pages

sys.path.append(str(Path(__file__).parents[1] / "transfer"))
from owner import Owner, fill, layout_of

pytestmark = pytest.mark.timeout(300)

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
HERE, THERE = [0, 39, 5], [7, 30, 8]


class Reader:
    """This process as a rank on GPU 0."""

    def __init__(self, layout: PageLayout) -> None:
        self.memory = allocate_pages(layout, torch.device("cuda", 0), "reader", shared=True)
        self.transport = make_transport("cuda_ipc", self.memory, "reader", "127.0.0.1")

    def read(self, owner: Owner, page_ids: Sequence[int], request_id: str = "r") -> None:
        source = owner.offer(THERE, request_id)
        pull = self.transport.pull(self.transport.connect(owner.endpoint), source, page_ids, PATIENCE_S)
        until = time.monotonic() + PATIENCE_S
        while self.transport.poll(pull) == "pending":
            assert time.monotonic() < until
            time.sleep(0.001)

    def check(self) -> None:
        """Pages HERE are the owner's pages THERE, and nothing else was written."""
        original = allocate_pages(self.memory.layout, torch.device("cpu"), "expected", shared=False)
        fill(original, 1)
        expected = torch.zeros_like(original.pages)
        expected[:, HERE] = original.pages[:, THERE]
        assert torch.equal(self.memory.pages.cpu(), expected)


@pytest.fixture(params=["cuda:0", pytest.param("cuda:1", marks=TWO)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the owner's pages are."""
    return str(request.param)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def owner_on(device: str, stack: ExitStack, layout: PageLayout, name: str = "one") -> Owner:
    owner = Owner(layout, ["cuda_ipc"], owner=name, device=device)
    stack.callback(owner.close)
    return owner


def reader_of(stack: ExitStack, layout: PageLayout) -> Reader:
    reader = Reader(layout)
    stack.callback(reader.transport.close)
    return reader


def test_pages_arrive_where_they_shall(device: str, stack: ExitStack) -> None:
    owner, reader = owner_on(device, stack, layout_of()), reader_of(stack, layout_of())
    reader.read(owner, HERE)
    reader.check()


@pytest.mark.parametrize(("n_owners", "n_readers"), [(1, 2), (2, 1)])
def test_tensor_parallelism_may_differ(device: str, n_owners: int, n_readers: int, stack: ExitStack) -> None:
    owners = [owner_on(device, stack, layout_of(rank, n_owners), f"o{rank}") for rank in range(n_owners)]
    for rank in range(n_readers):
        reader = reader_of(stack, layout_of(rank, n_readers))
        for index in source_ranks(reader.memory.layout, [owner.endpoint.layout for owner in owners]):
            reader.read(owners[index], HERE)
        reader.check()


def test_a_changed_page_is_noticed(device: str, stack: ExitStack) -> None:
    owner, reader = owner_on(device, stack, layout_of()), reader_of(stack, layout_of())
    source = owner.offer(THERE)
    owner.spoil(layer=1, page=30)
    pull = reader.transport.pull(reader.transport.connect(owner.endpoint), source, HERE, PATIENCE_S)
    with pytest.raises(WrongPages, match="layer 1, page 30, head 3"):
        wait_for(lambda: reader.transport.poll(pull) == "done")


def test_a_dead_owner(device: str, stack: ExitStack) -> None:
    """For who had read from it, for who comes only now, and when its number is another process's."""
    owner, reader = owner_on(device, stack, layout_of()), reader_of(stack, layout_of())
    reader.read(owner, HERE)
    (address,) = owner.endpoint.transports.values()
    number, started, *rest = msgspec.msgpack.decode(address)
    later = {"cuda_ipc": msgspec.msgpack.encode((number, started - 1, *rest))}
    with pytest.raises(PeerGone, match="another one by now"):
        reader.transport.connect(msgspec.structs.replace(owner.endpoint, owner="other", transports=later))
    source = owner.offer(THERE, "late")
    known = reader.transport.connect(owner.endpoint)
    owner.kill()
    with pytest.raises(PeerGone):
        reader.transport.pull(known, source, HERE, PATIENCE_S)
    with pytest.raises(PeerGone):
        reader_of(stack, layout_of()).transport.connect(owner.endpoint)


def test_what_peers_let_go_can_be_opened_again(device: str, stack: ExitStack) -> None:
    owner, reader = owner_on(device, stack, layout_of()), reader_of(stack, layout_of())
    for number in range(3):
        reader.read(owner, HERE, f"r{number}")
        reader.transport.disconnect(reader.transport.connect(owner.endpoint))
    reader.check()


def test_pages_on_a_cpu_are_refused() -> None:
    memory: PageMemory = allocate_pages(layout_of(), torch.device("cpu"), "cpu", shared=False)
    with pytest.raises(TransferUnavailable, match="not on a GPU"):
        make_transport("cuda_ipc", memory, "cpu", "127.0.0.1")


class GpuServer(Process):
    """An api_server that sees one GPU."""

    def __init__(self, model: Path, folder: Path, role: str, gpu: int) -> None:
        args = (*API_SERVER, "--model", str(model), "--host", "127.0.0.1", "--port", "0", "--dtype", "float32")
        args += ("--max-model-len", "256", "--num-gpu-blocks-override", "200", "--max-num-seqs", "16")
        args += ("--cache-transfer-protocol", "ipc", "--splitwise-role", role)
        super().__init__(args, folder, {"CUDA_VISIBLE_DEVICES": str(gpu), "FD_GROUP_SECRET": "only these"})

    def wait_ready(self) -> str:
        """Its URL."""
        wait_for(lambda: "ready at" in self.console or self.popen.poll() is not None, 200, "ready")
        found = re.search(r"ready at (http://\S+)", self.console)
        assert found, self.console
        return found[1]


def test_a_pair_of_servers(tiny_model: Callable[..., Path], tmp_path: Path, stack: ExitStack) -> None:
    """The tokens of a mixed server, and every prompt's pages have travelled."""
    model = tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=512)
    last = torch.cuda.device_count() - 1
    servers = []
    for role, gpu in (("mixed", 0), ("prefill", 0), ("decode", min(1, last))):
        servers.append(GpuServer(model, tmp_path / role, role, gpu))
        stack.callback(servers[-1].kill)
    mixed, prefill, decode = (server.wait_ready() for server in servers)
    found = re.search(r"other servers reach it at 127.0.0.1:(\d+)", servers[1].console)
    assert found, servers[1].console
    info = {"prefill_ip": "127.0.0.1", "prefill_connector_port": int(found[1])}
    with ThreadPoolExecutor(40) as pool:

        def ask(url: str, **body: Any) -> Any:
            return pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=PATIENCE_S)

        for i, n in enumerate((1, 15, 16, 64, 100, 200)):
            prompt = [3 + i, *(5 + (i * j) % 90 for j in range(n))]
            wanted = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
            pairing = {"request_id": f"r{i}", "disaggregate_info": info}
            asked = [ask(mixed, **wanted), ask(prefill, **wanted, **pairing), ask(decode, **wanted, **pairing)]
            right, _, answer = (one.result().json() for one in asked)
            ids = [one["choices"][0]["completion_token_ids"] for one in (right, answer)]
            assert ids[0] == ids[1]
    page = httpx.get(f"{decode}/metrics", timeout=PATIENCE_S).text
    assert "fastdeploy:pd_fallbacks_total{" not in page, page
    assert re.search(r"^fastdeploy:pd_pulled_requests_total 6\.0$", page, re.MULTILINE), page
