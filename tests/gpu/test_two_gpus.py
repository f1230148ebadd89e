"""Two GPUs with the experts of a model spread over them give the tokens of one."""

from __future__ import annotations

import random
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
