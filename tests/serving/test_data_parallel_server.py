"""One HTTP endpoint in front of several data-parallel ranks."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from processes import PATIENCE_S, Server, Stream, serving, wait_for

pytestmark = pytest.mark.timeout(240)

N_SLOTS = 2  # of each rank


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    """An answer of its whole length takes much longer than any test looks at it."""
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=4096, num_hidden_layers=8)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--data-parallel-size", "2", "--enable-expert-parallel", "--max-num-seqs", str(N_SLOTS))
    with serving(model, tmp_path_factory.mktemp("dp") / "run", *flags, "--max-model-len", "4096") as running:
        assert len(running.tree()) == 5
        yield running
        running.popen.terminate()
        assert running.end() == 0
        running.check_nothing_left()


def of_ranks(server: Server, name: str) -> list[float]:
    """A gauge of every rank, by rank."""
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    found = re.findall(rf'^fastdeploy:dp_rank_{name}{{dp_rank="(\d+)"}} (\S+)$', text, re.MULTILINE)
    assert [rank for rank, _ in found] == ["0", "1"], text
    return [float(value) for _, value in found]


def test_answers_and_figures(server: Server) -> None:
    prompts = [[5 + i, 7, 9, *range(3, 3 + i)] for i in range(12)]
    together = server.complete(prompt=prompts, max_tokens=6).json()["choices"]
    alone = [server.complete(prompt=prompt, max_tokens=6).json()["choices"][0] for prompt in prompts]
    assert [choice["text"] for choice in together] == [choice["text"] for choice in alone]
    assert server.health() == 200
    wait_for(lambda: all(of_ranks(server, "generated_tokens")), what="tokens of both ranks")
    n_tokens = 2 * 6 * len(prompts)
    wait_for(lambda: sum(of_ranks(server, "generated_tokens")) >= n_tokens, what="all tokens to be counted")
    wait_for(lambda: not any(of_ranks(server, "running_requests")), what="idle ranks")
    assert server.metric("dp_balance_ratio") == 1.0
    assert all(of_ranks(server, "free_blocks"))


def test_waiting_requests_move_to_a_rank_that_has_become_free(server: Server) -> None:
    """Long and short answers in turn: one rank gets the three long ones, more than it has slots for."""
    n_before = server.metric("requests_number_total")
    everything: list[Stream] = []
    for i in range(6):
        everything.append(Stream(server.url, prompt=[9, 8, 7], max_tokens=2 if i % 2 else 4000))
        wait_for(lambda: server.metric("requests_number_total") == n_before + len(everything), what="its arrival")
    long = everything[::2]
    try:
        for stream in long:
            assert stream.began.wait(PATIENCE_S), "a request starves while the other rank is idle"
        assert all(stream.is_alive() for stream in long)
        for stream in everything[1::2]:
            stream.join(PATIENCE_S)
            assert not stream.failed
        wait_for(lambda: sorted(of_ranks(server, "running_requests")) == [1, 2], what="long ones on both ranks")
        assert of_ranks(server, "waiting_requests") == [0, 0]
        assert 0.5 <= server.metric("dp_balance_ratio") <= 1.0
    finally:
        httpx.post(f"{server.url}/v1/abort_requests", json={"abort_all": True}, timeout=PATIENCE_S)
    for stream in everything:
        stream.join(PATIENCE_S)
        assert not stream.is_alive()
    wait_for(lambda: not any(of_ranks(server, "running_requests")), what="idle ranks")
    assert server.complete().status_code == 200
