"""The real demo model: greedy text, batched in one engine run, is that of transformers on both of its forms.

Transformers is fed the engine's own tokens in one pass and must find each of them the most likely one at its place.
By induction that is its greedy text, and it shows how close the second choice came. For a few prompts its own
`generate`, with a cache and left padding, is asked as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Answer, InProcessEngine, engine_config

from fastdeploy.demo.model import build_demo_model

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(900)]

N_TOKENS = 24
TOLERANCE = 2e-3  # of a log-probability, after 30 layers in another order of additions
# Prompts were chosen so that along each answer the second choice stays at least NEAR_TIE behind in the logits: nearer
# than that, two correct programs may differ. A prompt that violates it is reported as such.
NEAR_TIE = 1e-3

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Photosynthesis is the process by which",
    "In 1969, the first humans",
    "The three states of matter are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is 12 + 30?\nA:",
    "List of European countries and their capitals:\n1. Germany - Berlin\n2.",
    "中国的首都是",
    "从前有一座山,山里有",
    "人工智能是",
    "今天天气很好,我们",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef mean(values):\n",
    "SELECT name, age FROM users WHERE",
    "<html>\n<head>\n<title>",
    '{"name": "Alice", "age": 30, "city":',
)
CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a hash table is in one sentence.",
    "用中文说你好。",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
)
GENERATED = (0, 8, 12, 18)  # indices of one prompt of each kind


@pytest.fixture(scope="module")
def moe_folder() -> Path:
    return build_demo_model(show_progress=False)


@pytest.fixture(scope="module")
def dense_folder() -> Path:
    return build_demo_model(form="dense", show_progress=False)


@pytest.fixture(scope="module")
def tokenizer(moe_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(moe_folder)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of all prompts."""
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    templated = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return [tokenizer(text)["input_ids"] for text in (*TEXTS, *templated)]


def serve(folder: Path, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[Answer]:
    """All prompts in one run: batched, in chunks, a step ahead."""
    config = engine_config(folder, max_seqs=len(prompts), max_batched_tokens=150, steps_in_flight=2)
    return InProcessEngine(config).generate(prompts, max_tokens=n_tokens, logprobs=0)


@pytest.fixture(scope="module")
def answers(moe_folder: Path, prompts: list[list[int]]) -> list[Answer]:
    return serve(moe_folder, prompts, N_TOKENS)


def load(folder: Path) -> Any:
    """The transformers model in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def output_logits(model: Any, answers: Sequence[Answer], n_batch: int = 6) -> Iterator[tuple[Answer, torch.Tensor]]:
    """Each answer with the logits [n, V] from which its n tokens should come."""
    for begin in range(0, len(answers), n_batch):
        batch = answers[begin : begin + n_batch]
        fed = [(answer.prompt_ids + answer.token_ids)[:-1] for answer in batch]
        longest = max(map(len, fed))
        ids_sn = torch.tensor([ids + [0] * (longest - len(ids)) for ids in fed])
        hidden_snH = model.model(ids_sn, use_cache=False)[0]
        for answer, hidden_nH in zip(batch, hidden_snH, strict=True):
            n_prompt = len(answer.prompt_ids)
            yield answer, model.lm_head(hidden_nH[n_prompt - 1 : n_prompt - 1 + len(answer.token_ids)])


@torch.inference_mode()
def check_greedy(model: Any, answers: Sequence[Answer], tokenizer: Any) -> None:
    """Every token of every answer is the model's first choice, and as likely as the engine said."""
    for answer, logits_nV in output_logits(model, answers):
        prompt = tokenizer.decode(answer.prompt_ids)
        best_n2 = logits_nV.topk(2).values
        gap = (best_n2[:, 0] - best_n2[:, 1]).min().item()
        assert gap > NEAR_TIE, f"{prompt!r}: the two most likely tokens are {gap:.2g} apart: choose another prompt"
        assert tokenizer.decode(logits_nV.argmax(-1)) == tokenizer.decode(answer.token_ids), prompt
        assert logits_nV.argmax(-1).tolist() == answer.token_ids, prompt
        ids_n1 = torch.tensor(answer.token_ids)[:, None]
        expected_n = logits_nV.log_softmax(-1).gather(1, ids_n1)[:, 0].tolist()
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(expected_n, abs=TOLERANCE), prompt


def test_greedy_text_of_the_same_folder(moe_folder: Path, answers: list[Answer], tokenizer: Any) -> None:
    assert len(answers) >= 20 and all(len(answer.token_ids) == N_TOKENS for answer in answers)
    model = load(moe_folder)
    check_greedy(model, answers, tokenizer)
    chosen = [answers[i] for i in GENERATED]
    longest = max(len(answer.prompt_ids) for answer in chosen)
    n_left = [longest - len(answer.prompt_ids) for answer in chosen]
    ids_sn = torch.tensor([[0] * n + answer.prompt_ids for n, answer in zip(n_left, chosen, strict=True)])
    mask_sn = torch.tensor([[0] * n + [1] * (longest - n) for n in n_left])
    output_sn = model.generate(ids_sn, attention_mask=mask_sn, max_new_tokens=N_TOKENS, do_sample=False)
    assert output_sn[:, longest:].tolist() == [answer.token_ids for answer in chosen]


def test_greedy_text_of_the_dense_form(
    dense_folder: Path, answers: list[Answer], prompts: list[list[int]], tokenizer: Any
) -> None:
    """The mixture of experts was made to compute the same function; so was the other order of rotary pairs."""
    check_greedy(load(dense_folder), answers, tokenizer)
    for dense, answer in zip(serve(dense_folder, prompts, 8), answers, strict=True):
        assert dense.token_ids == answer.token_ids[:8]


def test_the_text_is_sensible(answers: list[Answer], tokenizer: Any) -> None:
    """Both sides could agree on garbage if the conversion were wrong."""
    texts = [tokenizer.decode(answer.token_ids) for answer in answers]
    assert texts[0].startswith(" Paris")
    assert "42" in texts[TEXTS.index("Q: What is 12 + 30?\nA:")]
    assert texts[len(TEXTS)].startswith("The capital of France is Paris.")
