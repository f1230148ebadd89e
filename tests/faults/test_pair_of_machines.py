"""Prefill on one machine, decode on another, each a network namespace: pages travel over TCP, and a cable is pulled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from network_namespaces import Machine, two_machines
from processes import API_SERVER, CPU_FLAGS, PATIENCE_S, Process, Server, serving, wait_for

pytestmark = pytest.mark.timeout(300)

FLAGS = ("--block-size", "8", "--max-model-len", "512", "--no-enable-prefix-caching")
PROMPTS = [[3 + i, *(5 + (i * j) % 40 for j in range(n))] for i, n in enumerate((1, 20, 64, 250, 300, 350))]
WANTED: dict[str, Any] = {"max_tokens": 30, "temperature": 0.8, "seed": 5, "return_token_ids": True}
CUT_S = 5.0


class Half(Server):
    """One server of the pair, on its machine."""

    def __init__(self, machine: Machine, model: Path, folder: Path, role: str) -> None:
        args = (*API_SERVER, "--model", str(model), "--host", machine.address, "--port", "0", *CPU_FLAGS, *FLAGS)
        env = {"FD_GROUP_SECRET": "only these two", "FD_HOST_IP": machine.address}
        Process.__init__(self, machine.command((*args, "--splitwise-role", role)), folder, env)
        self.machine = machine
        self.url = ""

    def complete(self, **body: Any) -> httpx.Response:
        return self.machine.call(lambda: super(Half, self).complete(**body))

    def metric(self, name: str) -> float:
        return self.machine.call(lambda: super(Half, self).metric(name))


class Pair:
    def __init__(self, prefill: Half, decode: Half) -> None:
        self.prefill, self.decode = prefill, decode
        found = re.search(rf"other servers reach it at {prefill.machine.address}:(\d+)", prefill.console)
        assert found, prefill.console
        self._info = {"prefill_ip": prefill.machine.address, "prefill_connector_port": int(found[1])}
        self._n_asked = 0

    def answers(self, meanwhile: Callable[[], None] = lambda: None) -> list[list[int]]:
        """Decode's answers to all prompts at once."""
        self._n_asked += 1
        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
            asked = []
            for i, prompt in enumerate(PROMPTS):
                pairing = {"request_id": f"{self._n_asked}-{i}", "disaggregate_info": self._info}
                body = {"prompt": prompt, **WANTED, **pairing}
                pool.submit(self.prefill.complete, **body)
                asked.append(pool.submit(self.decode.complete, **body))
            meanwhile()
            return [tokens(one.result()) for one in asked]

    def check_nothing_held(self) -> None:
        for server in (self.prefill, self.decode):
            wait_for(lambda s=server: s.metric("gpu_cache_usage_perc") == 0, what="pages given back")
            assert server.metric("pd_lent_blocks") == server.metric("pd_awaiting_requests") == 0


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["completion_token_ids"]
    return found


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=512, num_hidden_layers=5)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with serving(model, tmp_path_factory.mktemp("mixed") / "run", *FLAGS) as mixed:
        return [tokens(mixed.complete(prompt=prompt, **WANTED)) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        machines, halves = stack.enter_context(two_machines()), []
        for machine, role in zip(machines, ("prefill", "decode"), strict=True):
            halves.append(Half(machine, model, tmp_path_factory.mktemp(role) / "run", role))
            stack.callback(halves[-1].kill)
        for half in halves:
            half.wait_ready()
        yield Pair(*halves)


def test_the_same_as_a_mixed_server(pair: Pair, expected: list[list[int]]) -> None:
    assert pair.answers() == expected
    assert pair.decode.metric("pd_pulled_requests_total") == len(PROMPTS)
    pair.check_nothing_held()


def test_a_cable_that_is_pulled(pair: Pair, expected: list[list[int]]) -> None:
    """For a while decode cannot reach prefill: it reads later, or computes itself; then both work together again."""

    def cut() -> None:
        time.sleep(0.1)
        pair.prefill.machine.plug(connected=False)
        time.sleep(CUT_S)
        pair.prefill.machine.plug(connected=True)

    assert pair.answers(cut) == expected
    n_before = pair.decode.metric("pd_pulled_requests_total")

    def works_together() -> bool:
        assert pair.answers() == expected
        return pair.decode.metric("pd_pulled_requests_total") > n_before

    wait_for(works_together, 15.0 + PATIENCE_S, what="pages that travel again")
    pair.check_nothing_held()
