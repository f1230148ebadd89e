"""POST /v1/chat/completions through the official client: full answers, streams, log-probabilities, prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_engine import BOS, EOS, FakeGenerator, Served, logprob_of, serving

pytestmark = pytest.mark.timeout(120)

HI: list[Any] = [{"role": "user", "content": "hi"}]
RENDERED = "<user>hi<a>"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def events_of(served: Served, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
    """The data of every event; the last must be the end mark."""
    answer = httpx.post(served.url + path, json={"stream": True, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_full_answer(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model="any", messages=HI, temperature=0.5, top_p=0.9, seed=7, stop=["x"])
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("hello</s>"[:5], "assistant", "stop")
    assert answer.object == "chat.completion" and answer.model == "fake" and answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    n_prompt = len(RENDERED)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 6)
    assert answer.usage.total_tokens == n_prompt + 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == n_prompt // 4
    _, prompt_ids, params = served.generator.submitted[-1]
    assert bytes(prompt_ids).decode() == RENDERED
    assert (params.temperature, params.top_p, params.seed, params.stop) == (0.5, 0.9, 7, ["x"])


def test_full_answer_has_nulls(served: Served) -> None:
    message = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": HI}).json()["choices"][0]["message"]
    assert message == {
        "content": "hello",
        "role": "assistant",
        "multimodal_content": None,
        "reasoning_content": None,
        "tool_calls": None,
        "prompt_token_ids": None,
        "completion_token_ids": None,
        "prompt_tokens": None,
        "completion_tokens": None,
    }


def test_max_completion_tokens_wins_and_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=HI, max_completion_tokens=3, max_tokens=5)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hel", "length")


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=HI, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "hello"), (1, "hello1"), (2, "hello2")]
    assert answer.usage is not None and answer.usage.completion_tokens == 6 + 7 + 7


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=HI, stream=True, n=2, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    usage_chunk = chunks.pop()
    assert usage_chunk.choices == [] and usage_chunk.usage is not None
    assert usage_chunk.usage.completion_tokens == 6 + 7
    for index, text in enumerate(("hello", "hello1")):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert all(c.delta.role is None for c in mine[1:])
        assert "".join(c.delta.content or "" for c in mine) == text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_stream_without_options_has_no_usage(served: Served) -> None:
    assert not any("usage" in event for event in events_of(served, {"messages": HI}))


def test_empty_stream_options_mean_usage(served: Served) -> None:
    events = events_of(served, {"messages": HI, "stream_options": {}})
    assert [("usage" in event) for event in events] == [False] * (len(events) - 1) + [True]


def test_continuous_usage(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(served, {"messages": HI, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 1, 2, 3, 4, 5, 6, 6]


def test_chunks_leave_out_what_is_unset(served: Served) -> None:
    events = events_of(served, {"messages": HI})
    choice = events[1]["choices"][0]
    assert choice.pop("arrival_time") >= 0
    assert choice == {"index": 0, "delta": {"content": "h"}, "logprobs": None, "finish_reason": None}


def test_tokens_gathered_in_one_chunk(served: Served) -> None:
    events = events_of(served, {"messages": HI, "max_streaming_response_tokens": 4, "logprobs": True})
    assert [e["choices"][0]["delta"]["content"] for e in events] == ["", "hell", "o"]
    assert [len(e["choices"][0]["logprobs"]["content"]) for e in events[1:]] == [4, 2]


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_multibyte_text_is_whole_in_every_chunk(tokens_per_step: int) -> None:
    text = 'naïve "€" 🎉\n'
    generator = FakeGenerator(script=lambda ids, i: [*text.encode(), EOS], tokens_per_step=tokens_per_step)
    with serving(generator) as served:
        events = events_of(served, {"messages": HI})
        parts = [event["choices"][0]["delta"]["content"] for event in events]
        assert "".join(parts) == text and "\ufffd" not in "".join(parts)


def test_return_token_ids(served: Served) -> None:
    body = {"messages": HI, "return_token_ids": True}
    message = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["prompt_token_ids"] == list(RENDERED.encode()) and message["prompt_tokens"] == RENDERED
    assert message["completion_token_ids"] == [*b"hello", EOS] and message["completion_tokens"] == "hello</s>"
    events = events_of(served, body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["prompt_token_ids"] == list(RENDERED.encode())
    assert [i for delta in deltas[1:] for i in delta["completion_token_ids"]] == [*b"hello", EOS]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and logprobs.refusal is None
    first = logprobs.content[0]
    assert (first.token, first.bytes, first.logprob) == ("h", [ord("h")], pytest.approx(logprob_of(ord("h"), 1)))
    assert [(t.token, t.bytes) for t in first.top_logprobs] == [("i", [ord("i")]), ("h", [ord("h")])]
    assert len(logprobs.content) == 2


def test_logprobs_without_top(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": HI, "logprobs": True}).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 6 and all(entry["top_logprobs"] == [] for entry in content)


def test_streamed_logprobs_equal_full_ones(served: Served) -> None:
    body = {"messages": HI, "logprobs": True, "top_logprobs": 3}
    full = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    streamed = [
        entry
        for event in events_of(served, body)
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == full


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"messages": [1, 2, 3]}, [1, 2, 3]),
        ({"messages": [], "prompt_token_ids": [4, 5]}, [4, 5]),
        ({"messages": HI, "disable_chat_template": True}, [BOS, *b"hi"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, list(b"<user>a<a>")),
        ({"messages": HI, "chat_template": "{{ messages[0].content }}!"}, list(b"hi!")),
        ({"messages": HI, "chat_template_kwargs": {"add_generation_prompt": False}}, list(b"<user>hi")),
        ({"messages": HI, "tools": [{"type": "function"}], "tool_choice": "none"}, list(RENDERED.encode())),
    ],
)
def test_ways_to_give_a_prompt(served: Served, body: dict[str, Any], prompt: list[int]) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert served.generator.submitted[-1][1] == prompt


def test_metadata_fills_what_the_request_leaves_open(served: Served) -> None:
    body = {"messages": HI, "temperature": 0.25, "metadata": {"temperature": 1.5, "top_k": 3, "trace": "x"}}
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 200
    params = served.generator.submitted[-1][2]
    assert (params.temperature, params.top_k) == (0.25, 3)


def test_bad_words_and_bias_reach_the_engine(served: Served) -> None:
    body = {
        "messages": HI,
        "bad_words": ["a", "two"],
        "bad_words_token_ids": [7],
        "logit_bias": {"5": 1, "6": -100},
        "logits_processors_args": {"logit_bias": {"5": 9, "8": 2}},
    }
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 200
    params = served.generator.submitted[-1][2]
    assert params.bad_words_token_ids == [7, ord("a")] and params.bad_words is None
    assert params.logit_bias == {5: 1.0, 6: -100.0, 8: 2.0}


def test_aborted_request_says_so() -> None:
    with serving(FakeGenerator(script=lambda ids, i: [65] * 400, step_s=0.02)) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model="any", messages=HI, stream=True, extra_body={"request_id": "mine"}
        )
        seen = [next(stream), next(stream)]
        answer = httpx.post(f"{served.url}/v1/abort_requests", json={"req_ids": ["mine", "other"]}).json()
        seen += list(stream)
        client.close()
    assert seen[0].id == "chatcmpl-mine"
    assert seen[-1].choices[0].finish_reason == "abort"
    assert answer["status"] == "success" and answer["request_id"].startswith("control-")
    assert answer["result"]["not_found"] == ["other"]
    assert answer["result"]["aborted"][0]["request_id"] == "chatcmpl-mine"
    assert answer["result"]["aborted"][0]["output_token_count"] >= 1
