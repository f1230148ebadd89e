"""What is refused, with which status and field; what happens when the engine fails; who may ask how often."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_engine import MAX_MODEL_LEN, FakeGenerator, Served, serving

from fastdeploy.entrypoints.openai.body import MAX_BODY_BYTES
from fastdeploy.entrypoints.openai.state import Slots
from fastdeploy.errors import EngineDeadError, Overloaded

pytestmark = pytest.mark.timeout(120)

HI = [{"role": "user", "content": "hi"}]
SLOW: dict[str, Any] = {"script": lambda ids, i: [65] * 500, "step_s": 0.02}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(verify_model=True) as server:
        yield server
        assert not server.generator.alive_requests() and not len(server.state.live) and not server.state.slots.n_used


def error_of(answer: httpx.Response) -> Any:
    body = answer.json()
    assert list(body) == ["error"] and list(body["error"]) == ["message", "type", "param", "code"]
    assert answer.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": 1.1}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": 2}),
        ("presence_penalty", {"presence_penalty": 2.5}),
        ("frequency_penalty", {"frequency_penalty": -3}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 922337203685477581}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("n", {"n": True}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        ("stop", {"stop": ["x"] * 17}),
        ("stop", {"stop": "x" * 257}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": 5}),
        ("stop_token_ids", {"stop_token_ids": [999]}),
        ("bad_words", {"bad_words": "one"}),
        ("bad_words_token_ids", {"bad_words_token_ids": [258]}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"999": 1}}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
        ("logits_processors_args", {"logits_processors_args": {"other": 1}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 6}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
        ("stream_options", {"stream_options": {}}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("guided_json", {"guided_json": {}}),
        ("guided_regex", {"guided_regex": "a+"}),
        ("structural_tag", {"structural_tag": "x"}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("mm_hashes", {"mm_hashes": []}),
        ("reasoning_max_tokens", {"reasoning_max_tokens": 5}),
        ("disaggregate_info.prefill_ip", {"disaggregate_info": {}}),
        ("disaggregate_info", {"disaggregate_info": {"prefill_ip": "h", "prefill_connector_port": 1}}),
        ("include_draft_logprobs", {"include_draft_logprobs": True}),
        ("request_id", {"request_id": "with space"}),
        ("request_id", {"request_id": "x" * 257}),
        ("max_streaming_response_tokens", {"max_streaming_response_tokens": 0}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages", {"messages": [1, {"role": "user"}]}),
        ("messages", {"messages": [999]}),
        ("prompt_token_ids", {"prompt_token_ids": []}),
        ("messages", {"messages": [{"role": "user", "content": 5}], "disable_chat_template": True}),
        ("chat_template", {"chat_template": "{% broken"}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
    ],
)
def test_bad_chat_field_is_named(served: Served, param: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": HI, **fields}, timeout=60)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param in error["message"] or param == "chat_template"  # whose error is that of the template language


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a", 5]}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [5, -1]}),
        ("prompt", {"prompt": ["a"] * 257}),
        ("n", {"prompt": ["a"] * 9, "n": 128}),
        ("best_of", {"best_of": 1, "n": 2}),
        ("best_of", {"best_of": 3, "stream": True}),
        ("suffix", {"suffix": "the end"}),
        ("logprobs", {"logprobs": 6}),
        ("logprobs", {"logprobs": True}),
        ("max_tokens", {"max_tokens": 0}),
        ("guided_choice", {"guided_choice": ["a"]}),
    ],
)
def test_bad_completion_field_is_named(served: Served, param: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x", **fields})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param)


def test_missing_messages_have_their_own_code(served: Served) -> None:
    error = error_of(httpx.post(f"{served.url}/v1/chat/completions", json={}))
    assert (error["code"], error["param"]) == ("missing_required_parameter", "messages")


def test_unknown_fields_are_accepted(served: Served) -> None:
    body = {"messages": HI, "store": False, "whatever": {"x": 1}}
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(("model", "status"), [("fake", 200), ("default", 200), ("other", 404)])
def test_model_name(served: Served, model: str, status: int) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": HI, "model": model})
    assert answer.status_code == status
    if status == 404:
        assert error_of(answer)["code"] == "model_not_support"


@pytest.mark.parametrize("n_chars", [MAX_MODEL_LEN, MAX_MODEL_LEN * 600])
def test_too_long_a_prompt(served: Served, n_chars: int) -> None:
    for path, param, body in (
        ("completions", "prompt", {"prompt": "x" * n_chars}),
        ("chat/completions", "messages", {"messages": [{"role": "user", "content": "x" * n_chars}]}),
    ):
        answer = httpx.post(f"{served.url}/v1/{path}", json=body)
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nan", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_bodies_that_are_no_json_objects(served: Served, body: bytes) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and error_of(answer)["type"] == "invalid_request_error"


def test_other_content_types_are_refused(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 400 and error_of(answer)["param"] == "content-type"


@pytest.mark.parametrize("announced", [True, False])
def test_too_large_a_body(served: Served, announced: bool) -> None:
    size = MAX_BODY_BYTES + 1

    def pieces() -> Iterator[bytes]:
        for _ in range(size // 65536 + 1):
            yield b" " * 65536

    content = b" " * size if announced else pieces()
    answer = httpx.post(f"{served.url}/v1/completions", content=content, timeout=60)
    assert answer.status_code == 413 and str(MAX_BODY_BYTES) in error_of(answer)["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_wrong_path_or_method(served: Served, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, served.url + path)
    assert answer.status_code == status and path in error_of(answer)["message"]


def test_unexpected_failure_tells_nothing_and_the_server_goes_on() -> None:
    with serving(FakeGenerator(fail_after=0)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (500, "internal_error") and "secret" not in answer.text
        server.generator.fail_after = None
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("failure", "status"), [(Overloaded("the queue is full"), 429), (EngineDeadError("the engine is gone"), 503)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_token_has_its_status(failure: Exception, status: int, stream: bool) -> None:
    with serving(FakeGenerator(fail_after=0, failure=failure)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "stream": stream})
    assert answer.status_code == status and error_of(answer)["message"] == str(failure)


@pytest.mark.parametrize("fields", [{"fail_after": 2}, {"error_after": 2}])
def test_failure_in_a_stream_is_its_last_event(fields: dict[str, Any]) -> None:
    with serving(FakeGenerator(**fields)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    *_, failure, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(failure.removeprefix("data: "))["error"]
    assert error["code"] == "internal_error" and "secret" not in error["message"]


def test_engine_error_without_stream_is_500() -> None:
    with serving(FakeGenerator(error_after=1)) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 500 and "out of memory" in error_of(answer)["message"]


def test_waiting_too_long() -> None:
    with serving(FakeGenerator(first_step_s=30), max_waiting_s=0.2) as server:
        for stream in (False, True):
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "stream": stream}, timeout=60)
            error = error_of(answer)
            assert (answer.status_code, error["type"], error["code"]) == (504, "timeout_error", "timeout")
        server.wait_until(lambda: not server.generator.alive_requests())


def test_a_slow_stream_is_not_waiting() -> None:
    with serving(FakeGenerator(step_s=0.15), max_waiting_s=0.4) as server:
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=60).status_code == 200


def test_silent_engine_ends_the_request_only_when_it_is_unhealthy() -> None:
    with serving(FakeGenerator(first_step_s=1), silence_s=0.2) as server:
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=60).status_code == 200
        server.generator.first_step_s, server.generator.unhealthy = 60, "rank 0 is stuck"
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=60)
        assert answer.status_code == 503 and "rank 0 is stuck" in error_of(answer)["message"]


def test_duplicate_request_id() -> None:
    with serving(FakeGenerator(**SLOW)) as server:
        body = {"prompt": "x", "request_id": "twin"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as first:
            lines = first.iter_lines()  # held: a dropped iterator closes the connection
            next(lines)
            answer = httpx.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code == 400
            assert error_of(answer)["param"] == "request_id" and "cmpl-twin" in error_of(answer)["message"]
        server.wait_until(lambda: not len(server.state.live))
        assert httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": 1}).status_code == 200


def test_concurrency_limit_holds_until_the_last_byte() -> None:
    with serving(FakeGenerator(**SLOW), slots=Slots(1)) as server:
        body = {"prompt": "x", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as first:
            lines = first.iter_lines()  # held: a dropped iterator closes the connection
            next(lines)
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 429 and "1" in error_of(answer)["message"]
            assert error_of(answer)["code"] == "rate_limit_exceeded"
            assert httpx.get(f"{server.url}/health").status_code == 200
        server.wait_until(lambda: server.state.slots.n_used == 0)
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_api_keys() -> None:
    with serving(api_keys=("first", "sécond")) as server:
        path = f"{server.url}/v1/models"
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first"},
            {"authorization": "first"},
        ):
            answer = httpx.get(path, headers=header)
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
        for key in ("first", "sécond"):
            header_bytes = {"authorization": f"bEaReR {key}".encode()}
            assert httpx.get(path, headers=header_bytes).status_code == 200
        assert httpx.options(path).status_code == 405
        assert httpx.post(f"{server.url}/rearrange_experts").status_code == 401
        for free in ("/health", "/metrics", "/docs"):
            assert httpx.get(server.url + free).status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_request(stream: bool) -> None:
    with serving(FakeGenerator(**SLOW)) as server:
        body = {"prompt": ["x", "y"], "stream": stream}
        with httpx.Client(timeout=0.5 if not stream else 60) as client:
            if stream:
                with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()  # held: a dropped iterator closes the connection
                    next(lines)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server.url}/v1/completions", json=body)
        server.wait_until(lambda: server.generator.n_closed == 2)
        assert not len(server.state.live)
        server.wait_until(lambda: server.state.slots.n_used == 0)


def test_many_clients_at_once() -> None:
    texts: list[str] = []
    with serving(FakeGenerator(step_s=0.001)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def ask() -> None:
            stream = client.completions.create(model="any", prompt="x", stream=True)
            texts.append("".join(chunk.choices[0].text for chunk in stream))

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
    assert texts == ["hello"] * 16
