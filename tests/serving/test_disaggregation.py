"""Prefill on one server, decode on another: the same tokens as a mixed server gives, and nothing left over."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import PATIENCE_S, Server, serving, wait_for

pytestmark = pytest.mark.timeout(280)

FLAGS = ("--block-size", "8", "--max-model-len", "256")
PROMPTS = [[3 + i, *(5 + (i * j) % 40 for j in range(n))] for i, n in enumerate((1, 6, 7, 8, 20, 63, 64, 100))]
_numbers = itertools.count()


class Pair:
    """A prefill and a decode server; requests go to both, as a router sends them."""

    def __init__(self, prefill: Server, decode: Server) -> None:
        self.prefill, self.decode = prefill, decode
        found = re.search(r"other servers reach it at 127.0.0.1:(\d+)", prefill.console)
        assert found, prefill.console
        self.port = int(found[1])

    def complete(self, **body: Any) -> httpx.Response:
        """The answer of decode."""
        request_id = f"pair{next(_numbers)}"
        info = {"prefill_ip": "127.0.0.1", "prefill_connector_port": self.port, "decode_ip": "127.0.0.1"}
        whole = {"request_id": request_id, "disaggregate_info": info, **body}
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(self.prefill.complete, **whole)
            answer = self.decode.complete(**whole)
            assert answer.status_code == 200, answer.text
            assert other.result().status_code == 200, other.result().text
        return answer

    def check_nothing_lent(self) -> None:
        """All pages are given back on both sides."""
        for server in (self.prefill, self.decode):
            wait_for(lambda s=server: s.metric("gpu_cache_usage_perc") == 0, what="pages given back")
            assert server.metric("pd_lent_blocks") == server.metric("pd_awaiting_requests") == 0


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=512, num_hidden_layers=5)


@pytest.fixture(scope="module")
def mixed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("mixed") / "run", *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    env = {"FD_GROUP_SECRET": "only these two"}
    with (
        serving(model, folder / "prefill", *FLAGS, "--splitwise-role", "prefill", env=env) as prefill,
        serving(model, folder / "decode", *FLAGS, "--splitwise-role", "decode", env=env) as decode,
    ):
        yield Pair(prefill, decode)


def test_ranks_that_share_experts(model: Path, mixed: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two ranks on each side: the request may be on any core of the prefill server."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {"FD_GROUP_SECRET": "only these two"}
    flags = (*FLAGS, "--data-parallel-size", "2", "--enable-expert-parallel")
    with (
        serving(model, folder / "prefill", *flags, "--splitwise-role", "prefill", env=env) as prefill,
        serving(model, folder / "decode", *flags, "--splitwise-role", "decode", env=env) as decode,
    ):
        pair = Pair(prefill, decode)
        wanted: dict[str, Any] = {"max_tokens": 10, "return_token_ids": True, "temperature": 0.8, "seed": 5}
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            found = list(pool.map(lambda prompt: choices(pair.complete(prompt=prompt, **wanted)), PROMPTS))
        for prompt, answer in zip(PROMPTS, found, strict=True):
            expected = choices(mixed.complete(prompt=prompt, **wanted))
            assert answer[0]["completion_token_ids"] == expected[0]["completion_token_ids"]
        wait_for(lambda: decode.metric("pd_pulled_requests_total") == len(PROMPTS), what="all prompts pulled")
        pair.check_nothing_lent()


def choices(answer: httpx.Response) -> Any:
    return answer.json()["choices"]


BODIES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 0.9, "seed": 11, "n": 2},
    {"logprobs": 2},
    {"max_tokens": 1},
    {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "min_tokens": 3, "ignore_eos": False},
    {"echo": True, "logprobs": 1},
]


@pytest.mark.parametrize("body", BODIES, ids=json.dumps)
def test_the_same_as_a_mixed_server(mixed: Server, pair: Pair, body: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        wanted = {"prompt": prompt, "max_tokens": 12, "return_token_ids": True, **body}
        expected, found = choices(mixed.complete(**wanted)), choices(pair.complete(**wanted))
        assert [c["completion_token_ids"] for c in found] == [c["completion_token_ids"] for c in expected]
        assert [c["finish_reason"] for c in found] == [c["finish_reason"] for c in expected]
        if "logprobs" in body:
            for one, other in zip(found, expected, strict=True):
                assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
                pairs = zip(one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], strict=True)
                assert all(a == b or abs(a - b) < 1e-3 for a, b in pairs)
    wait_for(lambda: pair.decode.metric("pd_pulled_requests_total") > 0 or body.get("max_tokens") == 1)
    text = httpx.get(f"{pair.decode.url}/metrics", timeout=PATIENCE_S).text
    assert "fastdeploy:pd_fallbacks_total{" not in text, text
    pair.check_nothing_lent()


def test_an_answer_that_was_begun_elsewhere(mixed: Server, pair: Pair) -> None:
    """completion_token_ids: a router hands over what another server had to give up."""
    wanted: dict[str, Any] = {"prompt": PROMPTS[5], "max_tokens": 12, "return_token_ids": True, "temperature": 0.9}
    wanted["seed"] = 3
    whole = choices(mixed.complete(**wanted))[0]
    info = {"prefill_ip": "127.0.0.1", "prefill_connector_port": pair.port}
    for n_known in (1, 5, 11):
        known = whole["completion_token_ids"][:n_known]
        at_decode = {"request_id": f"begun{n_known}", "disaggregate_info": info}
        for server, more in ((mixed, {}), (pair.decode, {}), (pair.decode, at_decode)):
            answer = server.complete(**wanted, **more, completion_token_ids=known)
            (found,) = choices(answer)
            assert (found["completion_token_ids"], found["text"]) == (whole["completion_token_ids"], whole["text"])
            assert answer.json()["usage"]["completion_tokens"] == 12
        n_computed = pair.prefill.metric("request_success_total")
        dropped = pair.prefill.complete(**wanted, **at_decode, completion_token_ids=known)
        assert choices(dropped)[0]["completion_token_ids"] == [], "the prefill server has nothing to do"
        assert pair.prefill.metric("request_success_total") == n_computed
    for bad in ({"n": 2}, {"logprobs": 1}, {"max_tokens": 5}, {"prompt": PROMPTS[:2]}):
        refused = mixed.complete(**{**wanted, **bad}, completion_token_ids=[5, 6, 7, 8, 9])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "completion_token_ids"
    assert mixed.complete(**wanted, completion_token_ids=[10**6]).status_code == 400
    pair.check_nothing_lent()


def test_a_dead_prefill_server_costs_time_and_no_answer(mixed: Server, pair: Pair) -> None:
    """Last of this file: the prefill server is killed."""
    pair.prefill.kill()
    info = {"prefill_ip": "127.0.0.1", "prefill_connector_port": pair.port}
    wanted: dict[str, Any] = {"prompt": PROMPTS[4], "max_tokens": 8, "return_token_ids": True}
    found = pair.decode.complete(**wanted, request_id="alone", disaggregate_info=info)
    assert choices(found)[0]["completion_token_ids"] == choices(mixed.complete(**wanted))[0]["completion_token_ids"]
    wait_for(lambda: pair.decode.metric("gpu_cache_usage_perc") == 0, what="pages given back")
    text = httpx.get(f"{pair.decode.url}/metrics", timeout=PATIENCE_S).text
    assert 'fastdeploy:pd_fallbacks_total{reason="no_answer"} 1.0' in text, text
