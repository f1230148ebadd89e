"""Who pairs a prefill with a decode server: Redis, or the router. Answers are those of a mixed server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from processes import PATIENCE_S, Process, serving, wait_for

from fastdeploy.admission.private_redis import PrivateRedis

pytestmark = pytest.mark.timeout(280)

FLAGS = ("--block-size", "8", "--max-model-len", "256")
PROMPTS = [[3 + i, *(5 + (i * j) % 40 for j in range(n))] for i, n in enumerate((1, 20, 64, 100))]
WANTED = {"max_tokens": 10, "return_token_ids": True, "temperature": 0.8, "seed": 5}
ENV = {"FD_GROUP_SECRET": "only these two"}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=512)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with serving(model, tmp_path_factory.mktemp("mixed") / "run", *FLAGS) as mixed:
        return [_tokens(mixed.complete(prompt=prompt, **WANTED)) for prompt in PROMPTS]


def _tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["completion_token_ids"]
    return tokens


def test_redis_pairs(model: Path, expected: list[list[int]], tmp_path: Path) -> None:
    """Either server takes requests; both of a pair work on each, and the pages travel."""
    with PrivateRedis() as redis:
        shared = ("--scheduler-name", "splitwise", "--scheduler-port", str(redis.port))
        shared += ("--scheduler-password", redis.password, "--scheduler-topic", "pairs")
        with (
            serving(model, tmp_path / "p", *FLAGS, *shared, "--splitwise-role", "prefill", env=ENV) as prefill,
            serving(model, tmp_path / "d", *FLAGS, *shared, "--splitwise-role", "decode", env=ENV) as decode,
        ):
            for server in (prefill, decode):
                found = [_tokens(server.complete(prompt=prompt, **WANTED)) for prompt in PROMPTS]
                assert found == expected
            assert decode.metric("pd_pulled_requests_total") > 0
            wait_for(lambda: prefill.metric("pd_lent_blocks") == 0, what="pages given back")


def test_the_router_pairs(model: Path, expected: list[list[int]], tmp_path: Path) -> None:
    router = Process(
        ("-m", "fastdeploy.router.launch", "--host", "127.0.0.1", "--port", "0", "--splitwise"), tmp_path / "r"
    )
    url = wait_for(lambda: re.search(r"Starting server on (http://\S+),", router.console), what="the router")[1]
    flags = (*FLAGS, "--router", url)
    with (
        serving(model, tmp_path / "p", *flags, "--splitwise-role", "prefill", env=ENV),
        serving(model, tmp_path / "d", *flags, "--splitwise-role", "decode", env=ENV) as decode,
    ):
        there = {"mixed": 0, "prefill": 1, "decode": 1}
        wait_for(lambda: httpx.get(f"{url}/registered_number").json() == there, what="both servers")
        found = []
        for prompt in PROMPTS:
            body = {"model": "default", "prompt": prompt, **WANTED}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
            assert answer.headers["x-router-decode-url"] == decode.url
            found.append(_tokens(answer))
        assert found == expected
        assert decode.metric("pd_pulled_requests_total") > 0
    router.popen.terminate()
    assert router.end(PATIENCE_S) == 0
