"""A server that balances experts answers as one that does not, tells where they lie, and moves them when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import PATIENCE_S, Server, Stream, serving, wait_for

pytestmark = pytest.mark.timeout(240)

SETTINGS = '{"redundant_experts_num": 2, "rearrange_interval_s": 0, "min_gain": 0}'
SIZES = {"dp2": ("2", "1"), "tp2": ("1", "2")}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=4096)


@pytest.fixture(scope="module", params=SIZES)
def server(model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    data, tensor = SIZES[request.param]
    flags = ("--data-parallel-size", data, "--tensor-parallel-size", tensor, "--enable-expert-parallel")
    flags = (*flags, "--enable-eplb", "--eplb-config", SETTINGS, "--max-model-len", "4096")
    with serving(model, tmp_path_factory.mktemp(request.param) / "run", *flags) as running:
        yield running
        running.popen.terminate()
        assert running.end() == 0
        running.check_nothing_left()


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("plain") / "run") as running:
        yield running


def ask(server: Server, path: str) -> Any:
    answer = httpx.post(f"{server.url}{path}", timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def complete(server: Server, prompt: list[int]) -> str:
    text: str = server.complete(prompt=prompt, max_tokens=12).json()["choices"][0]["text"]
    return text


def test_experts_move_while_requests_run(server: Server, plain: Server) -> None:
    prompts = [[5 + i, 7, 9, *range(3, 3 + 3 * i)] for i in range(6)]
    expected = [complete(plain, prompt) for prompt in prompts]
    # Idle, and before anything was computed: a step for this alone, which finds nothing to do.
    first = ask(server, "/rearrange_experts")
    assert (first["n_moved"], first["busiest_over_mean_before"]) == (0, 1.0)
    assert first["redundant_experts_num"] == 2 and first["layers"] == [1]
    (ranks,) = first["experts"]
    assert [len(experts) for experts in ranks] == [5, 5] and {e for experts in ranks for e in experts} == set(range(8))
    assert [complete(server, prompt) for prompt in prompts] == expected
    running = Stream(server.url, prompt=prompts[-1], max_tokens=3000)
    assert running.began.wait(PATIENCE_S)
    moved = ask(server, "/rearrange_experts")
    assert moved["n_checks"] > first["n_checks"] and moved["n_moved"] > 0 and moved["experts"] != first["experts"]
    assert moved["busiest_over_mean_after"] <= moved["busiest_over_mean_before"]
    assert [complete(server, prompt) for prompt in prompts] == expected
    assert running.is_alive()
    httpx.post(f"{server.url}/v1/abort_requests", json={"abort_all": True}, timeout=PATIENCE_S)
    running.join(PATIENCE_S)
    assert ask(server, "/check_redundant")["experts"] == moved["experts"]


def test_rows_are_counted(server: Server) -> None:
    def n_rows() -> int:
        found = ask(server, "/get_per_expert_tokens_stats")
        assert found["layers"] == [1] and len(found["tokens"][0]) == 8
        return sum(found["tokens"][0])

    before = settled(n_rows)
    complete(server, [9] * 20)
    wait_for(lambda: n_rows() == before + 2 * (20 + 12 - 1), what="rows of all tokens but the last, to two experts")
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    counted = [line for line in text.splitlines() if line.startswith("fastdeploy:expert_tokens_total{")]
    assert len(counted) == 8
    assert sum(float(line.split()[1]) for line in counted) == n_rows()
    assert server.metric("eplb_checks_total") >= 1
    assert server.metric("eplb_busiest_over_mean_after") >= 1


def settled(count: Callable[[], int]) -> int:
    """What is counted once it stays the same for longer than ranks take to tell."""
    last, since_s = count(), time.monotonic()
    while time.monotonic() - since_s < 3:
        time.sleep(0.2)
        if (now := count()) != last:
            last, since_s = now, time.monotonic()
    return last


def test_a_server_that_leaves_experts_where_they_are(plain: Server) -> None:
    for path in ("/rearrange_experts", "/check_redundant", "/get_per_expert_tokens_stats"):
        answer = httpx.post(f"{plain.url}{path}", timeout=PATIENCE_S)
        assert answer.status_code == 501 and "--enable-eplb" in answer.json()["error"]["message"]
