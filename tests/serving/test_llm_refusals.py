"""What `LLM` refuses before anything is generated, and with which errors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdeploy import LLM, SamplingParams
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(180)

MAX_LEN = 256
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.fixture(scope="module")
def llm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_LOG_DIR", str(tmp_path_factory.mktemp("log")))
        engine = LLM(str(model), device="cpu", dtype="float32")
    with engine:
        yield engine


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        ({"text": "the"}, ValueError, "'prompt'"),
        ([{"prompt": "the"}, {}], ValueError, "'prompt'"),
        ({"prompt": "the", "multimodal_data": {}}, ValueError, "multimodal_data"),
        (5, TypeError, "int"),
        (["the", None], TypeError, "NoneType"),
        ([[1, "the"]], TypeError, "list"),
        ([[]], ValueError, "at least one token"),
        ([[5, 128]], ValueError, r"\[0, 127\]"),
        ([[5] * MAX_LEN], ValueError, "--max-model-len is 256"),
        (["half of a pair: \ud83d"], ValueError, "surrogate"),
    ],
)
def test_refused_prompts(llm: LLM, prompts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"logprobs": 21}, "--max-logprobs"),
        ({"prompt_logprobs": 21}, "--max-logprobs"),
        ({"stop": [str(i) for i in range(17)]}, "stop must have at most 16"),
        ({"stop": "x" * 257}, "256 characters"),
        ({"stop": [5]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": [128]}, "stop_token_ids"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words_token_ids": [-1]}, "bad_words_token_ids"),
        ({"logits_processors_args": {"logit_bias": {128: 1}}}, "logit_bias"),
        ({"logits_processors_args": {"logit_bias": {5: float("nan")}}}, "logit_bias"),
        ({"logits_processors_args": {"other": 1}}, "'other'"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"best_of": 3}, "best_of"),
        ({"min_tokens": MAX_LEN}, "min_tokens"),
    ],
)
def test_refused_params(llm: LLM, params: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        llm.generate("the", SamplingParams(**params))
    (after,) = llm.generate("the", GREEDY, use_tqdm=False)
    assert after.finished


def test_refused_calls(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 given for 3"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    for params in ({"temperature": 0}, [GREEDY, None, GREEDY]):
        with pytest.raises(TypeError, match="SamplingParams"):
            llm.generate(["a", "b", "c"], params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt_logprobs"):
        llm.generate("the", SamplingParams(prompt_logprobs=1), stream=True)


def test_refused_keywords(model: Path) -> None:
    with pytest.raises(TypeError, match=r"max_model_length.*max_model_len"):
        LLM(str(model), max_model_length=9)
    with pytest.raises(ConfigError, match="max-num-seqs"):
        LLM(str(model), max_num_seqs=0)
