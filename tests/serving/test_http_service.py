"""Everything but generation: health, models, tokens, abort, metrics, configuration, description, request ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_engine import BOS, MAX_MODEL_LEN, FakeGenerator, Served, serving

import fastdeploy
from fastdeploy.entrypoints.openai.catalog import GENERATING, NOT_SUPPORTED, OBSERVING, SERVING

pytestmark = pytest.mark.timeout(120)

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    environment = {"FD_LOG_DIR": "log", "FD_API_KEY": "s3cret", "CUDA_VISIBLE_DEVICES": "0", "AWS_SECRET": "s3cret"}
    with serving(environment=environment) as server:
        yield server


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
def test_health(served: Served, method: str, path: str) -> None:
    answer = httpx.request(method, served.url + path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_health_gives_the_reason() -> None:
    with serving(FakeGenerator(unhealthy="rank 0 made no progress for 31 s")) as server:
        answer = httpx.get(f"{server.url}/health")
        assert answer.status_code == 503 and "no progress for 31 s" in answer.json()["error"]["message"]
        server.generator.unhealthy = None
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_before_the_engine_is_up() -> None:
    with serving(generator=FakeGenerator(), stage="starting: weights") as server:
        server.state.generator = None
        for answer in (
            httpx.get(f"{server.url}/health"),
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}),
            httpx.post(f"{server.url}/tokenize", json={"prompt": "x"}),
        ):
            assert answer.status_code == 503 and "starting: weights" in answer.json()["error"]["message"]


def test_models(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == ("fake", "FastDeploy", "model")
    card = httpx.get(f"{served.url}/v1/models").json()["data"][0]
    assert card["max_model_len"] == MAX_MODEL_LEN and card["permission"][0]["id"].startswith("modelperm-")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokens(served: Served, prefix: str) -> None:
    body: dict[str, Any] = {"prompt": "hé", "return_token_strs": True}
    answer = httpx.post(f"{served.url}{prefix}/tokenize", json=body).json()
    ids = [BOS, *"hé".encode()]
    strings = ["<s>", "h", "\ufffd", "\ufffd"]
    assert answer == {"count": 4, "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": strings}
    answer = httpx.post(f"{served.url}{prefix}/tokenize", json={"messages": HI}).json()
    assert answer["tokens"] == list(b"<user>hi<a>") and answer["token_strs"] is None
    assert httpx.post(f"{served.url}{prefix}/detokenize", json={"tokens": ids}).json() == {"prompt": "<s>hé"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": HI}),
        ("/detokenize", {"tokens": [999]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/v1/abort_requests", {}),
        ("/v1/abort_requests", {"abort_all": False, "req_ids": []}),
        ("/v1/abort_requests", {"req_ids": "one"}),
    ],
)
def test_bad_bodies(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(served.url + path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"]


def test_abort_all() -> None:
    with serving(FakeGenerator(script=lambda ids, i: [65] * 500, step_s=0.02)) as server:
        body = {"prompt": ["a", "b"], "stream": True, "user": "anna/x"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            answer = httpx.post(f"{server.url}/v1/abort_requests", json={"abort_all": True}).json()
            rest = "\n".join(lines)
        request_id = answer["result"]["aborted"][0]["request_id"]
        assert request_id.startswith("cmpl-annax-") and request_id in first
        assert rest.count('"finish_reason":"abort"') == 2 and rest.rstrip().endswith("[DONE]")
        assert httpx.post(f"{server.url}/v1/abort_requests", json={"abort_all": True}).json()["result"]["aborted"] == []


def test_request_id_header(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "trace-1"})
    assert answer.headers["x-request-id"] == "trace-1" and answer.json()["id"] == "cmpl-trace-1"
    body = {"prompt": "x", "request_id": "cmpl-own"}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, headers={"x-request-id": "trace-1"})
    assert answer.headers["x-request-id"] == "trace-1" and answer.json()["id"] == "cmpl-own"
    hostile = httpx.get(f"{served.url}/health", headers={"x-request-id": "a b<c>\t;" + "d" * 500})
    assert hostile.headers["x-request-id"] == "abc" + "d" * 125
    made = [httpx.get(f"{served.url}/version").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and re.fullmatch("[0-9a-f]{32}", made[0])


def test_requests_that_share_a_trace_id_all_run() -> None:
    with serving(FakeGenerator(script=lambda ids, i: [65] * 500, step_s=0.02)) as server:
        header = {"x-request-id": "trace"}
        body = {"prompt": "x", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=header, timeout=60) as first:
            lines = first.iter_lines()  # held: a dropped iterator closes the connection
            next(lines)
            body = {"prompt": "x", "max_tokens": 1}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=header, timeout=60)
        assert answer.status_code == 200 and answer.json()["id"].startswith("cmpl-trace-")


def test_metrics_and_config(served: Served) -> None:
    httpx.get(f"{served.url}/no/such/path")
    answer = httpx.get(f"{served.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain") and "fastdeploy:" in answer.text
    assert 'path="other",status="404"' in answer.text
    info = httpx.get(f"{served.url}/config-info")
    assert info.json()["model"]["served_name"] == "fake"
    assert info.json()["env_config"] == {"CUDA_VISIBLE_DEVICES": "0", "FD_API_KEY": "(hidden)", "FD_LOG_DIR": "log"}
    assert "s3cret" not in info.text


def test_metrics_elsewhere() -> None:
    with serving(serves_metrics=False) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 404


def test_load_lists_the_v1_routes(served: Served) -> None:
    routes = httpx.get(f"{served.url}/load").json()["routes"]
    assert {"path": "/v1/completions", "methods": ["POST"], "tags": []} in routes
    assert all(route["path"].startswith("/v1") for route in routes)


def test_version(served: Served) -> None:
    assert httpx.get(f"{served.url}/version").json() == {"version": fastdeploy.__version__}


@pytest.mark.parametrize("endpoint", NOT_SUPPORTED, ids=lambda endpoint: endpoint.path)
def test_endpoints_of_the_original_that_are_missing(served: Served, endpoint: Any) -> None:
    answer = httpx.request(endpoint.methods[0], served.url + endpoint.path)
    assert answer.status_code == 501 and endpoint.path in answer.json()["error"]["message"]


def test_description_lists_every_route(served: Served) -> None:
    described = httpx.get(f"{served.url}/openapi.json").json()
    expected = {e.path for e in (*GENERATING, *SERVING, *OBSERVING, *NOT_SUPPORTED)} | {
        "/load",
        "/docs",
        "/openapi.json",
    }
    assert set(described["paths"]) == expected
    schemas = described["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', httpx.get(f"{served.url}/openapi.json").text))
    assert references <= set(schemas) and {"ChatRequest", "CompletionRequest", "ErrorBody"} <= references
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert any(part.get("maximum") == 128 for part in schemas["ChatRequest"]["properties"]["n"]["anyOf"])


def test_page_describes_every_endpoint_and_loads_nothing(served: Served) -> None:
    page = httpx.get(f"{served.url}/docs").text
    for endpoint in (*GENERATING, *SERVING, *OBSERVING, *NOT_SUPPORTED):
        assert endpoint.path in page
    assert "max_streaming_response_tokens" in page and f"curl {served.url}/v1/chat/completions" in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page) and "<script" not in page


def test_examples_of_the_page_work(served: Served) -> None:
    for endpoint in (*GENERATING, *SERVING):
        if endpoint.example is not None:
            answer = httpx.post(served.url + endpoint.path, json=endpoint.example)
            assert answer.status_code == 200, answer.text
