"""The prompts: token ids of shuffled English sentences, the same for every engine and every run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

SENTENCES = (
    "The ferry leaves the island every morning before the fog has lifted.",
    "A good recipe names the weight of the flour, not the number of cups.",
    "Rivers carry sand to the sea, and the sea gives it back as beaches.",
    "She counted the stars until the clouds closed over the valley.",
    "Most bridges move a little when a heavy train crosses them.",
    "The library keeps its oldest maps in drawers without light.",
    "Copper turns green in the rain, and the roofs of the town show it.",
    "Explain in simple words why the sky is blue and the sunset is red.",
    "Write a short letter to a friend who has moved to another country.",
    "What should a person know before planting an apple tree?",
    "The engineer listened to the machine and heard which bearing was worn.",
    "Ice takes more room than the water it was made of.",
    "In winter the baker starts his oven at two in the morning.",
    "List three ways to save water in a house with a garden.",
    "A compass does not point exactly to the north, and sailors know by how much.",
    "Nobody in the village remembered when the clock had stopped.",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted together; the answers have exactly `n_outputs` tokens."""

    name: str
    prompts: list[list[int]]
    n_outputs: list[int]

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def n_output_tokens(self) -> int:
        return sum(self.n_outputs)

    def describe(self) -> dict[str, object]:
        """Sizes, for the result file."""
        return {
            "n_requests": len(self.prompts),
            "prompt_lengths": [len(prompt) for prompt in self.prompts],
            "output_lengths": self.n_outputs,
        }


class PromptMaker:
    """Makes prompts with the tokenizer of `model` (a folder with tokenizer.json)."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def _prompt(self, rng: random.Random, n_tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < n_tokens:
            text = " ".join(rng.sample(SENTENCES, len(SENTENCES)))
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[:n_tokens]

    def uniform(self, name: str, n_requests: int, n_prompt: int, n_output: int, seed: int = 0) -> Workload:
        """Requests of one size."""
        rng = random.Random(seed)
        return Workload(name, [self._prompt(rng, n_prompt) for _ in range(n_requests)], [n_output] * n_requests)

    def mixed(
        self, name: str, n_requests: int, prompt: tuple[int, int], output: tuple[int, int], seed: int = 0
    ) -> Workload:
        """Lengths drawn evenly from the two closed ranges; with two requests or more their ends occur."""
        rng = random.Random(seed)
        n_prompts = [rng.randint(*prompt) for _ in range(n_requests)]
        n_outputs = [rng.randint(*output) for _ in range(n_requests)]
        if n_requests > 1:
            n_prompts[0], n_prompts[-1] = prompt
            n_outputs[0], n_outputs[-1] = reversed(output)
        return Workload(name, [self._prompt(rng, n) for n in n_prompts], n_outputs)
