"""POST /v1/completions through the official client: prompts of every kind, echo, log-probabilities, best_of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_engine import BOS, EOS, FakeGenerator, Served, logprob_of, serving
from test_http_chat import events_of

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(served: Served, **body: Any) -> Any:
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [[BOS, *b"ab"]]),
        (["ab", "c"], [[BOS, *b"ab"], [BOS, *b"c"]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_kinds_of_prompt(served: Served, client: openai.OpenAI, prompt: Any, prompts: list[list[int]]) -> None:
    served.generator.submitted.clear()
    answer = client.completions.create(model="any", prompt=prompt)
    assert sorted(ids for _, ids, _ in served.generator.submitted) == sorted(prompts)
    assert [c.index for c in answer.choices] == list(range(len(prompts)))
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, prompts))


def test_prompt_token_ids_win(served: Served) -> None:
    post(served, prompt="ignored", prompt_token_ids=[9, 8])
    assert served.generator.submitted[-1][1] == [9, 8]


def by_prompt(prompt_ids: list[int], choice: int) -> Iterable[int]:
    return [*f"{bytes(prompt_ids[1:]).decode()}{choice}".encode(), EOS]


@pytest.fixture(scope="module")
def naming() -> Iterator[Served]:
    """Answers with the prompt and the number of the choice."""
    with serving(FakeGenerator(script=by_prompt)) as server:
        yield server


def test_choices_of_several_prompts_are_in_order(naming: Served) -> None:
    answer = post(naming, prompt=["a", "bb"], n=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "a0"), (1, "a1"), (2, "bb0"), (3, "bb1")]


def test_stream_of_several_prompts(naming: Served) -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "stream_options": {"include_usage": True}}
    *events, usage = events_of(naming, body, "/v1/completions")
    texts = dict.fromkeys(range(4), "")
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: "a0", 1: "a1", 2: "bb0", 3: "bb1"}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3 + 3 + 4 + 4
    assert usage["usage"]["prompt_tokens"] == 2 + 3


def test_stream_with_the_client(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="any", prompt="x", stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "hello" and chunks[-1].choices[0].finish_reason == "stop"


def test_echo(served: Served) -> None:
    assert post(served, prompt="say: ", echo=True)["choices"][0]["text"] == "say: hello"
    assert post(served, prompt=[104, 105], echo=True)["choices"][0]["text"] == "hihello"
    events = events_of(served, {"prompt": "say: ", "echo": True}, "/v1/completions")
    assert [e["choices"][0]["text"] for e in events[:2]] == ["say: h", "e"]


def test_logprobs(served: Served) -> None:
    logprobs = post(served, prompt="x", logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "e", "l"] and logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == pytest.approx([logprob_of(i, 1) for i in b"hel"])
    assert logprobs["top_logprobs"][0] == pytest.approx({"i": logprob_of(ord("i")), "h": logprob_of(ord("h"))})


def test_the_taken_token_is_always_among_the_top(served: Served) -> None:
    logprobs = post(served, prompt="x", logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    assert set(logprobs["top_logprobs"][0]) == {"i", "h"}


def test_echo_with_logprobs(served: Served) -> None:
    body: dict[str, Any] = {"prompt": [104, 195, 169, 33], "echo": True, "logprobs": 1, "max_tokens": 2}
    choice = post(served, **body)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hé!he"
    assert logprobs["tokens"] == ["h", "\ufffd", "\ufffd", "!", "h", "e"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    events = events_of(served, body, "/v1/completions")
    parts = [event["choices"][0]["logprobs"] for event in events]
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        assert [entry for part in parts for entry in part[name]] == logprobs[name]


def test_scoring_a_prompt_without_output(served: Served) -> None:
    answer = post(served, prompt=[104, 105], echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == "hi" and choice["logprobs"]["tokens"] == ["h", "i"]
    assert answer["usage"]["completion_tokens"] == 0 and choice["finish_reason"] == "length"


def test_best_of_keeps_the_most_likely(served: Served) -> None:
    scripts = ([6, 6, EOS], [7, 7, EOS], [12, 12, EOS])  # log-probability falls with id mod 7
    with serving(FakeGenerator(script=lambda ids, i: scripts[i])) as server:
        answer = post(server, prompt="x", n=2, best_of=3, return_token_ids=True)
    assert [c["completion_token_ids"][0] for c in answer["choices"]] == [7, 12]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert all(c["logprobs"] is None for c in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 9


def test_return_token_ids_in_a_stream(served: Served) -> None:
    events = events_of(served, {"prompt": [1, 2], "return_token_ids": True}, "/v1/completions")
    assert events[0]["choices"][0]["prompt_token_ids"] == [1, 2]
    assert [i for e in events[1:] for i in e["choices"][0]["completion_token_ids"]] == [*b"hello", EOS]


def test_suffix_object_fills_the_request(served: Served) -> None:
    post(served, prompt="x", suffix={"top_k": 4})
    assert served.generator.submitted[-1][2].top_k == 4


def test_failure_of_one_prompt_ends_all() -> None:
    def script(prompt_ids: list[int], choice: int) -> Iterable[int]:
        if prompt_ids[-1] == 2:
            raise RuntimeError("broken")
        return [65] * 500

    with serving(FakeGenerator(script=script, step_s=0.01)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": [[1], [2], [3]]}, timeout=60)
        assert answer.status_code == 500 and "broken" not in answer.text
        server.wait_until(lambda: not server.generator.alive_requests() and not len(server.state.live))
