"""Two GPUs with the experts of a model spread over them give the tokens of one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdeploy import LLM, SamplingParams

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


SPREAD = {"data_parallel_size": 2, "enable_expert_parallel": True}


class Asked:
    """Greedy requests of random tokens to a model, and their answers."""

    def __init__(self, model: str, n_requests: int, n_outputs: tuple[int, int]) -> None:
        draw = random.Random(n_requests)
        self.model = model
        self.prompts = [[draw.randrange(5, 90) for _ in range(draw.randint(1, 60))] for _ in range(n_requests)]
        self.params = [
            SamplingParams(temperature=0.0, max_tokens=draw.randint(*n_outputs), ignore_eos=True) for _ in self.prompts
        ]

    def answers(self, check: Callable[[LLM], None] | None = None, **flags: Any) -> list[list[int]]:
        """Token ids of all answers of an engine with `flags`, which `check` looks at afterwards."""
        sizes = {"max_model_len": 160, "max_num_seqs": 16, "num_gpu_blocks_override": 200}
        with LLM(model=self.model, dtype="float32", **sizes, **flags) as llm:
            found = llm.generate(self.prompts, self.params)
            if check is not None:
                check(llm)
        return [list(answer.outputs.token_ids) for answer in found]


@pytest.mark.parametrize("exchange", ["symm_mem", "nccl"])
def test_tokens_are_those_of_one_gpu(
    tiny_model: Callable[..., Path], exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_ALL_TO_ALL", exchange)
    asked = Asked(str(tiny_model("ernie4_5_moe", tokenizer=True)), 30, (1, 24))
    assert asked.answers() == asked.answers(**SPREAD)


@pytest.mark.parametrize("exchange", ["symm_mem", "nccl"])
def test_experts_move_under_captured_graphs(
    tiny_model: Callable[..., Path], exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some fifty times a second, in the middle of answers, most steps of which are replayed from graphs."""
    monkeypatch.setenv("FD_ALL_TO_ALL", exchange)
    asked = Asked(str(tiny_model("ernie4_5_moe", tokenizer=True)), 40, (20, 90))
    settings = {"redundant_experts_num": 2, "rearrange_interval_s": 0.02, "min_gain": 0.0}
    found = asked.answers(_check_moved, **SPREAD, enable_eplb=True, eplb_config=settings)
    assert asked.answers() == found


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
