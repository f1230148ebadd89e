"""Two GPUs with the experts of a model spread over them give the tokens of one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdeploy import LLM, SamplingParams

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("exchange", ["symm_mem", "nccl"])
def test_tokens_are_those_of_one_gpu(
    tiny_model: Callable[..., Path], exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_ALL_TO_ALL", exchange)
    folder, draw = str(tiny_model("ernie4_5_moe", tokenizer=True)), random.Random(0)
    prompts = [[draw.randrange(5, 90) for _ in range(draw.randint(1, 60))] for _ in range(30)]
    params = [SamplingParams(temperature=0.0, max_tokens=draw.randint(1, 24), ignore_eos=True) for _ in prompts]
    common = {
        "model": folder,
        "dtype": "float32",
        "max_model_len": 160,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 200,
    }
    answers = []
    for sizes in ({}, {"data_parallel_size": 2, "enable_expert_parallel": True}):
        with LLM(**common, **sizes) as llm:
            found = llm.generate(prompts, params)
            answers.append([list(answer.outputs.token_ids) for answer in found])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("exchange", ["symm_mem", "nccl"])
def test_experts_move_under_captured_graphs(
    tiny_model: Callable[..., Path], exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some fifty times a second, in the middle of answers, most steps of which are replayed from graphs."""
    monkeypatch.setenv("FD_ALL_TO_ALL", exchange)
    folder, draw = str(tiny_model("ernie4_5_moe", tokenizer=True)), random.Random(1)
    prompts = [[draw.randrange(5, 90) for _ in range(draw.randint(1, 60))] for _ in range(40)]
    params = [SamplingParams(temperature=0.0, max_tokens=draw.randint(20, 90), ignore_eos=True) for _ in prompts]
    common = {
        "model": folder,
        "dtype": "float32",
        "max_model_len": 160,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 200,
    }
    settings = {"redundant_experts_num": 2, "rearrange_interval_s": 0.02, "min_gain": 0.0}
    balanced = {
        "data_parallel_size": 2,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": settings,
    }
    answers = []
    for flags in ({}, balanced):
        with LLM(**common, **flags) as llm:
            found = llm.generate(prompts, params)
            answers.append([list(answer.outputs.token_ids) for answer in found])
            if flags:
                _check_moved(llm)
    assert answers[0] == answers[1]


def _check_moved(llm: LLM) -> None:
    """Ranks tell about once a second what they did."""
    desk = llm._generator.experts
    assert desk is not None
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        report = desk.report()
        if report is not None and report.n_moved_total > 0:
            assert report.n_checks_total > 1 and sum(report.rows_le[0]) > 0
            return
        time.sleep(0.1)
    raise AssertionError("no expert has moved")
