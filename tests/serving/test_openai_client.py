"""A real server with a tiny model, asked with the official client."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import Server, serving, streams, wait_for

from fastdeploy.frontend.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.timeout(180)

MAX_LEN = 4096
LONG = 4000  # tokens: an answer that does not end while a test looks
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
CHAT: list[Any] = [{"role": "user", "content": "the other one"}]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=MAX_LEN)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--block-size", "16", "--max-model-len", str(MAX_LEN))
    with serving(model, tmp_path_factory.mktemp("server") / "run", *flags) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def wait_idle(server: Server) -> None:
    """Until the engine has neither running nor waiting requests, and holds no page."""
    wait_for(
        lambda: (
            not server.metric("num_requests_running")
            and not server.metric("num_requests_waiting")
            and server.metric("available_gpu_block_num") == server.metric("max_gpu_block_num")
        ),
        10,
        "an idle engine",
    )


# ---- answers --------------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI, model: Path) -> None:
    (card,) = client.models.list().data
    assert card.id and card.object == "model"


def test_completion(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(prompt="the other one", **GREEDY)
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and choice.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode("the other one"))
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    ids = tokenizer.encode("the other one")
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == choice.text


def test_completion_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["the", "and here", "is it so"]
    alone = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]
    together = client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=CHAT, **GREEDY)
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    rendered = "<|im_start|>user\nthe other one<|im_end|>\n<|im_start|>assistant\n"
    assert client.completions.create(prompt=rendered, **GREEDY).choices[0].text == message.content


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = client.completions.create(prompt="the", **GREEDY)
    *chunks, last = client.completions.create(prompt="the", **GREEDY, **usage)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert not last.choices and last.usage and last.usage.completion_tokens == 12

    message = client.chat.completions.create(messages=CHAT, n=2, seed=3, **{**GREEDY, "temperature": 1})
    texts = ["", ""]
    for chunk in client.chat.completions.create(
        messages=CHAT, n=2, seed=3, stream=True, **{**GREEDY, "temperature": 1}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in message.choices] and texts[0] != texts[1]


def test_stop(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="the", **GREEDY).choices[0].text
    stop = whole[5:7]
    answer = client.completions.create(prompt="the", stop=stop, **GREEDY).choices[0]
    assert answer.finish_reason == "stop" and answer.text == whole[: whole.index(stop)]
    streamed = client.completions.create(prompt="the", stop=[stop], stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.text


def test_bad_words(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="the", **GREEDY).choices[0].text
    word = whole.strip()[0]
    body = {"ignore_eos": True, "bad_words": [word]}
    other = client.completions.create(prompt="the", **{**GREEDY, "extra_body": body}).choices[0].text
    assert other and other != whole


def test_completion_logprobs_and_echo(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(prompt="the other", logprobs=2, echo=True, **GREEDY).choices[0]
    assert answer.text.startswith("the other") and answer.logprobs is not None
    assert answer.logprobs.tokens is not None and answer.logprobs.token_logprobs is not None
    n_prompt = len(tokenizer.encode("the other"))
    assert "".join(answer.logprobs.tokens) == answer.text
    assert len(answer.logprobs.tokens) == len(answer.logprobs.token_logprobs) == n_prompt + 12
    assert answer.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in answer.logprobs.token_logprobs[1:])


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert len(answer.logprobs.content) == 12
    for entry in answer.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token and entry.logprob == entry.top_logprobs[0].logprob
    shown = [entry.token for entry in answer.logprobs.content if not entry.token.startswith("<")]  # no special tokens
    assert "".join(shown) == answer.message.content


def test_seeds(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return client.completions.create(prompt="the", seed=seed, **{**GREEDY, "temperature": 1}).choices[0].text

    assert text(1) == text(1) and text(1) != text(2)


def test_prefix_hits_show_in_usage(client: openai.OpenAI) -> None:
    prompt = [9, 8, 7, 6, 5, 4] * 11

    def n_cached() -> int | None:
        usage = client.completions.create(prompt=prompt, **GREEDY).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert [n_cached(), n_cached()] == [0, 64]


def test_many_clients_at_once(server: Server) -> None:
    """32 clients over 8 slots, each with its own prompt; each answer is the one it gets alone."""
    prompts = [[5 + i, 6, 7] for i in range(32)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:

            async def ask(i: int) -> str:
                if i % 2:
                    return (await client.completions.create(prompt=prompts[i], **GREEDY)).choices[0].text
                stream = await client.completions.create(prompt=prompts[i], stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*[ask(i) for i in range(32)])

    together = asyncio.run(ask_all())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:
        alone = client.completions.create(prompt=prompts, **GREEDY)
    assert together == [choice.text for choice in alone.choices]
    wait_idle(server)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt=[5] * MAX_LEN, **GREEDY)
    assert caught.value.code == "context_length_exceeded" and f"--max-model-len is {MAX_LEN}" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "x " * MAX_LEN}], **GREEDY)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -1),
        ("top_p", 2),
        ("n", 0),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("stop", ["x"] * 17),
        ("seed", -1),
        ("presence_penalty", 3),
    ],
)
def test_bad_parameters(client: openai.OpenAI, param: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="the", **{**GREEDY, param: value})
    assert caught.value.param == param and param in caught.value.message


def test_model_names_count_only_when_one_was_given(
    client: openai.OpenAI, model: Path, tmp_path: Path, server: Server
) -> None:
    assert client.completions.create(prompt="the", **{**GREEDY, "model": "anything"}).choices
    with (
        serving(model, tmp_path / "run", "--served-model-name", "tiny") as named,
        openai.OpenAI(base_url=f"{named.url}/v1", api_key="none", max_retries=0) as other,
    ):
        assert [card.id for card in other.models.list()] == ["tiny"]
        assert other.completions.create(prompt="the", **{**GREEDY, "model": "tiny"}).model == "tiny"
        with pytest.raises(openai.NotFoundError, match="'anything'"):
            other.completions.create(prompt="the", **{**GREEDY, "model": "anything"})


# ---- requests that end early ----------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_all_at_once(server: Server) -> None:
    body = {"prompt": "the", "max_tokens": LONG, "ignore_eos": True, "n": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        pieces = answer.iter_text()
        assert next(pieces)
        wait_for(lambda: server.metric("num_requests_running") == 3)
    wait_idle(server)

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=1.5)
    wait_idle(server)


def test_a_client_that_leaves_while_it_waits(server: Server) -> None:
    running = streams(server, 8, max_tokens=LONG)
    body = {"prompt": "the", "max_tokens": LONG, "ignore_eos": True, "request_id": "late"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=1.5)
    wait_for(lambda: not server.metric("num_requests_waiting"), 10)
    assert server.metric("num_requests_running") == 8
    httpx.post(f"{server.url}/v1/abort_requests", json={"abort_all": True})
    for stream in running:
        stream.join(30)
        assert '"finish_reason":"abort"' in stream.text and stream.ended == "done"
    wait_idle(server)


def test_abort_by_id(server: Server, client: openai.OpenAI) -> None:
    answers: list[Any] = []

    def ask() -> None:
        extra = {"request_id": "doomed", "ignore_eos": True}
        answers.append(client.chat.completions.create(messages=CHAT, model="any", max_tokens=LONG, extra_body=extra))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: server.metric("num_requests_running"))
    wait_for(lambda: server.metric("generation_tokens_total"))
    answer = httpx.post(f"{server.url}/v1/abort_requests", json={"req_ids": ["doomed", "unknown"]}).json()
    asking.join(30)
    assert answer["status"] == "success" and answer["result"]["not_found"] == ["unknown"]
    (aborted,) = answer["result"]["aborted"]
    assert re.fullmatch("chatcmpl-doomed", aborted["request_id"])
    (found,) = answers
    assert found.choices[0].finish_reason == "abort" and 0 < found.usage.completion_tokens < LONG
    wait_idle(server)
