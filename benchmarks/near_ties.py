"""Where greedy answers depend on how many requests are computed together: the step, its two best logits, how far apart.

    python benchmarks/near_ties.py

Matrix products of other row counts add in another order, so logits differ in their last digits. The same prompts are
answered all at once, thirteen at a time and five at a time, with one thread and with two. Wherever an answer differs
from the first run's, the two best logits of the first differing step are shown: two tokens within rounding of each
other are a tie; anything else is a bug, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from machine import hardware
from workload import PromptMaker

from fastdeploy import LLM, SamplingParams
from fastdeploy.demo.model import build_demo_model
from fastdeploy.outputs import CompletionOutput

TIE_LIMIT = 1e-5  # distance over size of the logits; float32 has 24 bits, and a logit is the end of some thousand sums
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64


def answer(llm: LLM, prompts: list[list[int]], n_together: int) -> list[CompletionOutput]:
    """Greedy answers with the two best logits of each step, `n_together` requests at a time."""
    params = SamplingParams(
        temperature=0.0, max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=2
    )
    found = []
    for first in range(0, len(prompts), n_together):
        outputs = llm.generate(prompts[first : first + n_together], params, use_tqdm=False)
        found += [output.outputs for output in outputs]  # type: ignore[union-attr]
    return found


def first_difference(ours: CompletionOutput, reference: CompletionOutput) -> dict[str, object] | None:
    """The step at which two answers part, None where they do not."""
    pairs = zip(ours.token_ids, reference.token_ids, strict=True)
    step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if step is None:
        return None
    both = []
    for output in (reference, ours):
        assert output.logprobs is not None
        entry = output.logprobs[step]
        both.append(dict(zip(entry.top_ids, entry.top_logprobs, strict=True)))
    tokens = [reference.token_ids[step], ours.token_ids[step]]
    logits = [[of_run.get(token) for token in tokens] for of_run in both]
    known = [logit for pair in logits for logit in pair if logit is not None]
    if len(known) < 4:  # one chose what is not even second to the other
        return {"step": step, "tokens": tokens, "logits": logits, "relative_distance": float("inf")}
    distance = max(abs(a - b) for a, b in logits if a is not None and b is not None)
    return {
        "step": step,
        "tokens": tokens,
        "logits": logits,
        "relative_distance": distance / max(map(abs, known)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file")
    flags = parser.parse_args()
    model = build_demo_model(form="moe")
    prompts = PromptMaker(model).uniform("equal", flags.requests, PROMPT_TOKENS, OUTPUT_TOKENS).prompts
    reference: list[CompletionOutput] | None = None
    differences, n_answers = [], 0
    for n_threads in (2, 1):
        options = {"device": "cpu", "dtype": "float32", "threads": n_threads, "max_num_seqs": 64}
        with LLM(str(model), logprobs_mode="raw_logits", enable_prefix_caching=False, **options) as llm:
            for n_together in (flags.requests, 13, 5):
                answers = answer(llm, prompts, n_together)
                if reference is None:
                    reference = answers
                    continue
                n_answers += len(answers)
                for i, (ours, theirs) in enumerate(zip(answers, reference, strict=True)):
                    if (found := first_difference(ours, theirs)) is not None:
                        found |= {"prompt": i, "threads": n_threads, "together": n_together}
                        differences.append(found)
                        print(found, flush=True)
    worst = max((d["relative_distance"] for d in differences), default=0.0)
    result = {
        "benchmark": "near_ties",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "command": " ".join(["python", "benchmarks/near_ties.py", *sys.argv[1:]]),
        "answers_compared": n_answers,
        "differences": differences,
        "largest_relative_distance": worst,
        "limit": TIE_LIMIT,
    }
    if flags.output:
        flags.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{n_answers} answers compared, {len(differences)} differ, largest relative distance {worst:.2e}")
    return 1 if worst > TIE_LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
