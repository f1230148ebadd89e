"""`LLM` over real processes: every form of call, every kind of answer, and what it refuses."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import wait_for
from tiny_models import reference_model

from fastdeploy import LLM, SamplingParams
from fastdeploy.errors import EngineUnavailable
from fastdeploy.frontend.tokenizer import Tokenizer, load_tokenizer
from fastdeploy.outputs import RequestOutput

pytestmark = pytest.mark.timeout(180)

MAX_LEN = 256
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEXTS = ["the other one", "is it so", "and here"]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def llm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_LOG_DIR", str(tmp_path_factory.mktemp("log")))
        engine = LLM(str(model), device="cpu", dtype="float32", block_size=16)
    with engine:
        yield engine


def answers(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    found = llm.generate(prompts, params, use_tqdm=False)
    assert isinstance(found, list)
    return found


def answer(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    """One answer: greedy, 12 tokens, whatever else is asked for."""
    wanted = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
    (found,) = answers(llm, prompt, SamplingParams(**wanted))
    return found


def is_idle(llm: LLM) -> bool:
    """As the engine itself reports it."""
    return b"\nfastdeploy:num_requests_running 0.0\n" in llm.metrics.render()


# ---- forms of a call ------------------------------------------------------------------------------------------------


def test_every_form_of_prompt(llm: LLM, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in TEXTS]
    expected = [answer(llm, text).outputs.token_ids for text in TEXTS]
    for prompts in (TEXTS, ids, [{"prompt": text} for text in TEXTS], [TEXTS[0], ids[1], {"prompt": ids[2]}]):
        found = answers(llm, prompts)
        assert [output.outputs.token_ids for output in found] == expected
        assert [output.prompt for output in found] == prompts
        assert [output.prompt_token_ids for output in found] == ids
        assert all(output.finished and output.error_code == 200 for output in found)
    for prompt in (TEXTS[0], ids[0], {"prompt": TEXTS[0]}):
        (single,) = answers(llm, prompt)
        assert single.outputs.token_ids == expected[0] and single.prompt == prompt


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert answers(llm, []) == []


def test_more_prompts_than_run_at_once_come_back_in_order(llm: LLM) -> None:
    prompts = [[5 + i, 7, 9] for i in range(20)]
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, ignore_eos=True) for i in range(20)]
    found = answers(llm, prompts, params)
    assert [output.prompt for output in found] == prompts
    assert [len(output.outputs.token_ids) for output in found] == [1 + i % 5 for i in range(20)]
    alone = [answers(llm, prompt, one)[0].outputs.token_ids for prompt, one in zip(prompts, params, strict=True)]
    assert [output.outputs.token_ids for output in found] == alone


def test_defaults_fill_the_context(llm: LLM) -> None:
    (found,) = answers(llm, "the", SamplingParams(temperature=0, ignore_eos=True))
    assert len(found.prompt_token_ids) + len(found.outputs.token_ids) == MAX_LEN
    assert found.outputs.finish_reason == "length"
    (unset,) = answers(llm, "the", None)
    assert unset.finished and unset.outputs.finish_reason in ("stop", "length")


def test_progress_goes_to_stderr(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(TEXTS, GREEDY)
    out, err = capfd.readouterr()
    assert out == "" and "3/3" in err and "tokens/s" in err
    llm.generate(TEXTS, GREEDY, use_tqdm=False)
    assert capfd.readouterr() == ("", "")


# ---- what is generated ----------------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_says(llm: LLM, model: Path, tokenizer: Tokenizer) -> None:
    reference = reference_model(model)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    for found, ids in zip(answers(llm, prompts), prompts, strict=True):
        given = torch.tensor([ids])
        expected = reference.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12, min_new_tokens=12
        )
        assert found.outputs.token_ids == expected[0, len(ids) :].tolist()
        assert found.outputs.text == tokenizer.decode(found.outputs.token_ids)


def test_a_seed_decides(llm: LLM) -> None:
    def texts(seed: int | None) -> list[str]:
        params = SamplingParams(temperature=1.0, seed=seed, n=3, max_tokens=12, ignore_eos=True)
        return [choice.text for choice in answers(llm, "the", params)[0].all_outputs]

    assert texts(5) == texts(5)
    assert len(set(texts(5))) == 3
    assert texts(5)[1:] == texts(6)[:2]  # choice i draws with seed + i
    assert texts(None) != texts(None)


def test_several_answers(llm: LLM) -> None:
    found = answer(llm, "the", n=2)
    assert [choice.index for choice in found.all_outputs] == [0, 1]
    assert found.outputs is found.all_outputs[0]
    first, second = found.all_outputs
    assert first.token_ids == second.token_ids == answer(llm, "the").outputs.token_ids
    assert found.to_dict()["all_outputs"][1]["text"] == found.to_dict()["outputs"]["text"] == first.text
    json.dumps(found.to_dict()["metrics"])


def test_stop_string(llm: LLM) -> None:
    whole = answer(llm, TEXTS[0]).outputs.text
    stop = whole[4:7]
    cut = answer(llm, TEXTS[0], stop=[stop, "zzz"]).outputs
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = answer(llm, TEXTS[0], stop=stop, include_stop_str_in_output=True).outputs
    assert kept.text == whole[: whole.index(stop) + len(stop)]


def test_stop_token(llm: LLM, tokenizer: Tokenizer) -> None:
    ids = answer(llm, TEXTS[0]).outputs.token_ids
    stop = ids[5]
    n = ids.index(stop)
    cut = answer(llm, TEXTS[0], stop_token_ids=[stop]).outputs
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == ids[: n + 1] and cut.text == tokenizer.decode(ids[:n])
    forced = answer(llm, TEXTS[0], stop_token_ids=[stop], min_tokens=12).outputs
    assert len(forced.token_ids) == 12 and stop not in forced.token_ids[:11]


def test_logprobs(llm: LLM) -> None:
    found = answer(llm, "the", logprobs=3).outputs
    assert found.logprobs is not None and found.top_logprobs is not None
    assert [entry.token_id for entry in found.logprobs] == found.token_ids
    for entry, top in zip(found.logprobs, found.top_logprobs, strict=True):
        assert entry.rank == 1 and len(top) == 3
        assert max(top, key=top.__getitem__) == entry.token_id and top[entry.token_id] == entry.logprob < 0
    assert answer(llm, "the").outputs.logprobs is None


def test_prompt_logprobs(llm: LLM) -> None:
    found = answer(llm, TEXTS[0], prompt_logprobs=2, max_tokens=1)
    assert found.prompt_logprobs is not None
    first, *others = found.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in others if entry] == found.prompt_token_ids[1:]


def test_bad_words(llm: LLM, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    ids = answer(llm, TEXTS[0]).outputs.token_ids
    word = tokenizer.decode([ids[0]]).strip()
    banned = [i for i in (tokenizer.id_of(word), tokenizer.id_of(f"Ġ{word}")) if i is not None]
    changed = answer(llm, TEXTS[0], bad_words=[word]).outputs.token_ids
    assert ids[0] in banned and not set(banned) & set(changed)
    assert changed == answer(llm, TEXTS[0], bad_words_token_ids=banned).outputs.token_ids
    with caplog.at_level(logging.WARNING):
        assert answer(llm, TEXTS[0], bad_words=["zqxj"]).outputs.token_ids == ids
    assert "'zqxj' is more than one token" in caplog.text


def test_logit_bias(llm: LLM) -> None:
    found = answer(llm, "the", logits_processors_args={"logit_bias": {77: 100.0}}).outputs
    assert found.token_ids == [77] * 12


def test_cached_tokens_are_told(llm: LLM) -> None:
    prompt = [9, 8, 7, 6, 5] * 10
    assert answer(llm, prompt).num_cached_tokens == 0
    assert answer(llm, prompt).num_cached_tokens == 48


def test_times(llm: LLM) -> None:
    before_s = time.time()
    times = answer(llm, "the").metrics
    stages = [
        before_s,
        times.arrival_time or 0.0,
        times.inference_start_time or 0.0,
        times.engine_recv_first_token_time or 0.0,
        times.engine_recv_latest_token_time or 0.0,
        time.time(),
    ]
    assert stages == sorted(stages)
    assert times.time_in_queue == stages[2] - stages[1]


# ---- streams, chat, threads -----------------------------------------------------------------------------------------


def test_stream_grows(llm: LLM) -> None:
    whole = {output.prompt: output.outputs for output in answers(llm, TEXTS, SamplingParams(**LOGGED))}
    partial: dict[str, list[RequestOutput]] = {text: [] for text in TEXTS}
    for output in llm.generate(TEXTS, SamplingParams(**LOGGED), stream=True):
        partial[output.prompt].append(output)
    for text, outputs in partial.items():
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert len(outputs) > 3
        for earlier, later in pairwise(outputs):
            assert later.outputs.text.startswith(earlier.outputs.text)
            assert earlier.outputs.token_ids == later.outputs.token_ids[: len(earlier.outputs.token_ids)]
            assert len(earlier.outputs.token_ids) == len(earlier.outputs.logprobs or []) < len(later.outputs.token_ids)
        # Other requests stood beside it: sums of other lengths round differently.
        last, expected = outputs[-1].outputs, whole[text]
        assert last.logprobs is not None and expected.logprobs is not None
        assert [p.logprob for p in last.logprobs] == pytest.approx([p.logprob for p in expected.logprobs], abs=1e-4)
        assert replace(last, logprobs=None) == replace(expected, logprobs=None)


LOGGED: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}


def test_leaving_a_stream_aborts(llm: LLM) -> None:
    for output in llm.generate(["the", "and"], SamplingParams(ignore_eos=True, max_tokens=240), stream=True):
        assert not output.finished
        wait_for(lambda: not is_idle(llm), what="a busy engine")
        break
    wait_for(lambda: is_idle(llm) and not llm._generator.alive_requests(), what="an idle engine")


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "the other"}]
    text = "<|im_start|>user\nthe other<|im_end|>\n<|im_start|>assistant\n"
    (found,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert found.prompt == text
    assert found.outputs.token_ids == answer(llm, text).outputs.token_ids
    both = list(llm.chat([conversation, [{"role": "user", "content": "is it"}]], GREEDY, use_tqdm=False))
    assert both[0].outputs == found.outputs and both[1].prompt == text.replace("the other", "is it")
    (last,) = [output for output in llm.chat(conversation, GREEDY, stream=True) if output.finished]
    assert last.outputs == found.outputs


def test_chat_options(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    template = "{{ messages[0].content }}|{{ tools[0].name }}|{{ enable_thinking }}"
    (found,) = llm.chat(
        conversation,
        GREEDY,
        use_tqdm=False,
        chat_template=template,
        chat_template_kwargs={"enable_thinking": False},
        tools=[{"name": "look"}],
    )
    assert found.prompt == "hi|look|False"
    for tools in ({"name": "look"}, ["look"], "look"):
        with pytest.raises(RuntimeError, match="tools"):
            llm.chat(conversation, GREEDY, tools=tools)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="messages"):
        llm.chat([{"content": "no role"}], GREEDY)
    with pytest.raises(ValueError, match="2 given for 1"):
        llm.chat(conversation, [GREEDY, GREEDY])


def test_calls_from_several_threads(llm: LLM) -> None:
    expected = {text: answer(llm, text).outputs for text in TEXTS}
    found: list[tuple[str, Any]] = []

    def ask(text: str) -> None:
        found.extend((text, answer(llm, text).outputs) for _ in range(3))

    threads = [threading.Thread(target=ask, args=(text,)) for text in TEXTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 9
    assert all(outputs.token_ids == expected[text].token_ids for text, outputs in found)


# ---- faults, more than one, and the end -----------------------------------------------------------------------------


def test_a_failing_answer_reaches_its_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the front end: the call that meets it raises, and does not wait for ever."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("fastdeploy.llm._merge", broken)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            llm.generate("the", GREEDY, use_tqdm=False)
    assert answer(llm, "the").finished


def test_two_in_one_process_and_a_call_after_the_end(llm: LLM, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(llm, "the").outputs.token_ids
    monkeypatch.setenv("FD_LOG_DIR", str(model.parent / "log2"))
    second = LLM(str(model), device="cpu", dtype="float32")
    try:
        assert second._check_master()
        assert answer(second, "the").outputs.token_ids == expected
        errors: list[BaseException] = []

        def long_call() -> None:
            try:
                answer(second, "the", max_tokens=250)
            except EngineUnavailable as error:
                errors.append(error)

        caller = threading.Thread(target=long_call)
        caller.start()
        wait_for(second._generator.alive_requests)
    finally:
        second.close()
    caller.join(30)
    assert [str(error) for error in errors] == ["the engine stopped: the engine was stopped"]
    second.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        answer(second, "the")
    assert answer(llm, "the").outputs.token_ids == expected


def test_a_bug_that_deafens_the_front_end_ends_all_calls(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path))

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    with LLM(str(model), device="cpu", dtype="float32") as deaf:
        deaf.metrics.update = broken  # type: ignore[method-assign]
        with pytest.raises(EngineUnavailable, match="engine events: ZeroDivisionError: a bug"):
            answer(deaf, "the", max_tokens=250)
