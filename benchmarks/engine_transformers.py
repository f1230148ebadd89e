"""Engine script: Hugging Face transformers' `generate`, driven over `lines`.

A batch is static, as `generate` has it: prompts padded on the left to the longest, and all rows run until the row
with the most output tokens is done; the surplus of the other rows is cut off and does not count as output.
Settings: model, n_threads, dtype, experts ("auto" measures every implementation, at batch 1 and 16, and takes the
fastest for each).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lines import serve
from transformers import AutoModelForCausalLM, GenerationConfig, __version__
from transformers.generation.streamers import BaseStreamer

EXPERT_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PROBE_PROMPT = list(range(100, 132))
N_PROBE_TOKENS = 8
PROBES = {"single": 1, "batch": 16}  # how many prompts


class _Clock(BaseStreamer):
    """Notes when each step's tokens were there; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """A model in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["n_threads"])
        dtype = getattr(torch, settings["dtype"])
        model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
        self._model = model.eval()
        # Every request runs to its full length. `generate` fills unset fields from the model's own configuration.
        self._model.generation_config.eos_token_id = None
        self._pad_id = self._model.config.pad_token_id or 0
        self._experts: dict[str, str] = {}
        self._probed_s: dict[str, dict[str, float]] = {}
        if getattr(self._model.config, "moe_num_experts", None) or getattr(self._model.config, "num_experts", None):
            wanted = settings.get("experts", "auto")
            for size, n_prompts in PROBES.items():
                self._experts[size] = self._fastest_experts(size, n_prompts, wanted)

    def _fastest_experts(self, size: str, n_prompts: int, wanted: str) -> str:
        """The implementation of experts to use for this size of batch."""
        prompts, seconds = [PROBE_PROMPT] * n_prompts, self._probed_s.setdefault(size, {})
        for name in EXPERT_IMPLEMENTATIONS if wanted == "auto" else (wanted,):
            try:
                self._model.set_experts_implementation(name)
                self._generate(prompts, [2] * n_prompts)
            except (ValueError, RuntimeError, NotImplementedError) as exc:
                if wanted != "auto":
                    raise
                print(f"experts implementation {name}: {exc}")
                continue
            tries = [self._generate(prompts, [N_PROBE_TOKENS] * n_prompts)["wall_s"] for _ in range(2)]
            seconds[name] = round(min(tries), 4)
        return min(seconds, key=lambda name: seconds[name])

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"transformers {__version__}",
            "torch": torch.__version__,
            "n_threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
            "experts": self._experts,
            "experts_probed_s": self._probed_s,
        }

    def generate(self, prompts: list[list[int]], n_outputs: list[int]) -> dict[str, Any]:
        if self._experts:
            self._model.set_experts_implementation(self._experts["single" if len(prompts) == 1 else "batch"])
        return self._generate(prompts, n_outputs)

    def _generate(self, prompts: list[list[int]], n_outputs: list[int]) -> dict[str, Any]:
        width, n_steps, clock = max(map(len, prompts)), max(n_outputs), _Clock()
        make_config: Any = GenerationConfig  # untyped
        config = make_config(max_new_tokens=n_steps, do_sample=False, pad_token_id=self._pad_id)
        start_s = time.perf_counter()
        ids_sT = torch.tensor([[self._pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_sT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out_sT = self._model.generate(ids_sT, attention_mask=mask_sT, generation_config=config, streamer=clock)
        new_ids = out_sT[:, width:].tolist()
        wall_s = time.perf_counter() - start_s
        if len(new_ids[0]) != n_steps:
            raise RuntimeError(f"generate returned {len(new_ids[0])} tokens, {n_steps} were asked for")
        return {
            "wall_s": wall_s,
            "token_ids": [row[:n] for row, n in zip(new_ids, n_outputs, strict=True)],
            "decode_s": clock.times_s[n_outputs[0]] - clock.times_s[1],
        }

    def close(self) -> None:
        """Nothing was started."""


if __name__ == "__main__":
    serve(Transformers)
