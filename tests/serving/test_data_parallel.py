"""`LLM` over several data-parallel ranks: whatever the number of ranks, the answers are those of one."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import Process, wait_for

from fastdeploy import LLM, SamplingParams
from fastdeploy.errors import ConfigError
from fastdeploy.outputs import RequestOutput

pytestmark = pytest.mark.timeout(240)

N_PROMPTS = 32
N_SLOTS = 3  # of a rank, so that requests wait
TOPOLOGIES = [(2, True), (4, True), (2, False), (4, False)]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@contextmanager
def running(model: Path, log: Path, **kwargs: Any) -> Iterator[LLM]:
    """An `LLM` that leaves nothing behind."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_LOG_DIR", str(log))
        llm = LLM(str(model), device="cpu", dtype="float32", max_num_seqs=N_SLOTS, block_size=16, **kwargs)
    with llm:
        yield llm
    wait_for(lambda: not set(psutil.Process().children(recursive=True)) - before, 10, "all processes to end")


def mixed_load() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 90 tokens, some with a common beginning; greedy and seeded, one and two answers."""
    dice = random.Random(7)
    common = [dice.randrange(3, 120) for _ in range(40)]
    prompts, params = [], []
    for i in range(N_PROMPTS):
        own = [dice.randrange(3, 120) for _ in range(dice.choice([1, 2, 5, 17, 50]))]
        prompts.append(common + own if i % 4 == 0 else own)
        fields: dict[str, Any] = {"max_tokens": 1 + i % 9, "ignore_eos": i % 3 > 0, "logprobs": 3}
        if i % 5 == 4:
            fields |= {"n": 2, "temperature": 0.8, "top_p": 0.9, "seed": i}
        else:
            fields |= {"temperature": 0.0}
        params.append(SamplingParams(**fields))
    return prompts, params


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RequestOutput]:
    """What one rank answers."""
    with running(model, tmp_path_factory.mktemp("one")) as llm:
        return generate(llm, *mixed_load())


@pytest.fixture(scope="module", params=TOPOLOGIES, ids=lambda p: f"dp{p[0]}{'-ep' if p[1] else ''}")
def llm(model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[LLM]:
    n_data, expert = request.param
    folder = tmp_path_factory.mktemp("many")
    with running(model, folder, data_parallel_size=n_data, enable_expert_parallel=expert) as engine:
        yield engine


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    found = llm.generate(prompts, params, use_tqdm=False)
    assert isinstance(found, list)
    return found


def check_same(found: RequestOutput, wanted: RequestOutput) -> None:
    """Same tokens, log-probabilities within 1e-4."""
    assert found.prompt_token_ids == wanted.prompt_token_ids and found.finished
    for ours, theirs in zip(found.all_outputs, wanted.all_outputs, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank) and a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-4)


def test_answers_are_those_of_one_rank(llm: LLM, expected: list[RequestOutput]) -> None:
    """More prompts than slots, in the order they were given, twice: the second time prefixes are in the cache."""
    for _ in range(2):
        found = generate(llm, *mixed_load())
        assert [output.request_id for output in found] == [str(i) for i in range(N_PROMPTS)]
        for ours, theirs in zip(found, expected, strict=True):
            check_same(ours, theirs)
    n_data = llm.config.parallel.data
    rates = [f'\nfastdeploy:dp_rank_generated_tokens{{dp_rank="{rank}"}}' for rank in range(n_data)]
    text = llm.metrics.render().decode()
    assert all(rate in text for rate in rates)


def test_one_prompt_for_all_ranks(llm: LLM, expected: list[RequestOutput]) -> None:
    prompts, params = mixed_load()
    for i in range(3):
        (found,) = generate(llm, prompts[i], params[i])
        check_same(found, expected[i])
    assert generate(llm, [], SamplingParams()) == []


def test_stream(llm: LLM, expected: list[RequestOutput]) -> None:
    prompts, params = mixed_load()
    last: dict[str, RequestOutput] = {}
    for output in llm.generate(prompts, params, stream=True):
        before = last.get(output.request_id)
        if before is not None:
            assert output.outputs.text.startswith(before.outputs.text) and not before.finished
        last[output.request_id] = output
    for i, wanted in enumerate(expected):
        check_same(last[str(i)], wanted)


def test_leaving_a_stream_empties_all_ranks(llm: LLM) -> None:
    params = SamplingParams(ignore_eos=True, max_tokens=200)
    for _ in llm.generate([[3 + i] for i in range(16)], params, stream=True):
        break

    def is_idle() -> bool:
        text = llm.metrics.render().decode()
        lines = [line for line in text.splitlines() if line.startswith("fastdeploy:dp_rank_")]
        busy = [line for line in lines if "_requests{" in line and not line.endswith(" 0.0")]
        return bool(lines) and not busy and not llm._generator.alive_requests()

    wait_for(is_idle, what="all ranks to be idle")


# ---- the offline script --------------------------------------------------------------------------------------------

SCRIPT = """
from fastdeploy import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "你好，请问今天是星期",
    "请写6个以数字开头的成语",
    "写一个300字的小说大纲，内容是李白穿越到现代，最后成为公司文职人员的故事",
    "我要采访一位科幻作家，创建一个包含5个问题的列表"
]

sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=128)

llm = LLM(
    model={model!r},
    tensor_parallel_size=1,
    data_parallel_size=8,
    max_model_len=8192,
    num_gpu_blocks_override=1024,
    engine_worker_queue_port="6077,6078,6079,6080,6081,6082,6083,6084",
    enable_expert_parallel=True,
)
outputs = llm.generate(prompts, sampling_params)

for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs.text
    print("generated_text: ", generated_text)
    print("\\n")
assert [output.prompt for output in outputs] == prompts
"""


@pytest.mark.timeout(400)
def test_the_offline_script(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """As it is documented, less the arguments of the scheduler over several servers."""
    model = tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=8192)
    (tmp_path / "script.py").write_text(SCRIPT.format(model=str(model)))
    process = Process([str(tmp_path / "script.py")], tmp_path / "run")
    try:
        wait_for(lambda: len(process.tree()) == 17 or process.popen.poll() is not None, what="8 cores, 8 ranks")
        assert process.end(300) == 0, process.console
        process.check_nothing_left()
    finally:
        process.kill()
    assert process.console.count("generated_text: ") == 5
    assert "5/5" in process.console  # the progress bar
    assert "Exception ignored" not in process.console


def test_the_scheduler_over_several_servers_needs_a_redis(model: Path) -> None:
    flags = {"scheduler_name": "splitwise", "scheduler_host": "127.0.0.1", "scheduler_topic": "test"}
    with pytest.raises(ConfigError, match=r"no Redis at 127\.0\.0\.1:1 .*\n`fastdeploy redis --port 1`"):
        LLM(str(model), data_parallel_size=8, enable_expert_parallel=True, device="cpu", scheduler_port=1, **flags)
