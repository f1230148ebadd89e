"""Engine script: `fastdeploy.LLM`, driven over `lines`. Settings: the keywords of `LLM`."""

from __future__ import annotations

import time
from typing import Any

from lines import serve


class FastDeploy:
    """An LLM and its processes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from fastdeploy import LLM

        self._llm = LLM(**settings)

    def describe(self) -> dict[str, Any]:
        import torch

        import fastdeploy

        cache = self._llm.config.cache
        return {
            "engine": f"fastdeploy {fastdeploy.__version__}",
            "torch": torch.__version__,
            "page_tokens": cache.page_tokens,
            "max_seqs": self._llm.config.scheduler.max_seqs,
        }

    def generate(self, prompts: list[list[int]], n_outputs: list[int]) -> dict[str, Any]:
        from fastdeploy import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in n_outputs]
        start_s = time.perf_counter()
        outputs = list(self._llm.generate(list(prompts), params, use_tqdm=False))
        wall_s = time.perf_counter() - start_s
        failed = [output.error_msg for output in outputs if output.error_msg]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
        times = outputs[0].metrics
        first_s, last_s = times.engine_recv_first_token_time, times.engine_recv_latest_token_time
        return {
            "wall_s": wall_s,
            "token_ids": [output.outputs.token_ids for output in outputs],
            "decode_s": last_s - first_s if first_s and last_s else None,
        }

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    serve(FastDeploy)
