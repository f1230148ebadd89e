"""fastdeploy's LLM against transformers' `generate` on a CPU: one request, and 16 at once of mixed lengths.

    python benchmarks/cpu_offline.py            # about 20 minutes on 2 cores
    python benchmarks/cpu_offline.py --quick    # smoke check

Both engines run in processes of their own that stay alive; they take turns, so that a slow phase of the machine meets
both. The headline is output tokens per second of the whole call, prompt included: it is what a caller waits for and
leaves nobody's cost out (fastdeploy also turns the tokens into text in that time). The decode speed after the first
token is given beside it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from engines import (
    LOAD_TIMEOUT_S,
    add_common_flags,
    common_settings,
    fastdeploy,
    measure,
    result_path,
    transformers,
)
from report import Line, Report, compare, equal_tokens
from workload import PromptMaker, Workload

from fastdeploy.demo.model import build_demo_model

NAME = "cpu_offline"
FORMS = {"moe": "ERNIE-4.5-MoE form", "dense": "dense Llama form"}
SINGLE_TARGETS = {"moe": 1.5, "dense": 1.2}
MIXED_TARGET = 3.0
MAX_SEQS = 16


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, default_rounds=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="(default: both)")
    parser.add_argument("--cases", nargs="+", choices=("single", "mixed"), default=["single", "mixed"])
    parser.add_argument(
        "--experts", default="auto", help="transformers' implementation of experts; auto takes the fastest at batch 1"
    )
    return parser.parse_args()


def workloads(model: Path, flags: argparse.Namespace) -> list[Workload]:
    """One request of 32 + 128 tokens; 16 of 16..256 + 16..128."""
    maker = PromptMaker(model)
    single = maker.uniform("single", 1, 32, 16 if flags.quick else 128)
    mixed = maker.mixed("mixed", MAX_SEQS, (16, 64 if flags.quick else 256), (4, 16) if flags.quick else (16, 128))
    return [workload for workload in (single, mixed) if workload.name in flags.cases]


def run_form(report: Report, form: str, flags: argparse.Namespace) -> None:
    """All cases of one form of the model."""
    model = build_demo_model(form=form)  # type: ignore[arg-type]
    cases = workloads(model, flags)
    report.settings["workloads"] = {workload.name: workload.describe() for workload in cases}
    with fastdeploy(model, flags, MAX_SEQS) as ours, transformers(model, flags, flags.experts) as peer:
        engines = [ours, peer]
        for engine in engines:
            engine.start(LOAD_TIMEOUT_S)
            report.versions[f"{engine.name}, {form}"] = engine.description
        pids = [engine.pid for engine in engines]
        for workload in cases:
            short = [min(n, 4) for n in workload.n_outputs]
            for engine in engines:
                engine.generate(workload.prompts, short)  # warm-up with the same shapes
            results: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
            for i in range(flags.rounds):
                for engine in engines:
                    one = partial(measure, report, workload, engine, pids, form=form, round=i)
                    results[engine.name].append(report.undisturbed(one, flags.tries))
            summarise(report, form, workload, results[ours.name], results[peer.name])


def summarise(
    report: Report, form: str, workload: Workload, ours: list[dict[str, Any]], peer: list[dict[str, Any]]
) -> None:
    """The ratios of one case, and how far the greedy answers agree."""

    def ratio(what: str, key: str, peer_name: str, target: float | None) -> Line:
        return compare(what, "output tokens/s", [r[key] for r in ours], peer_name, [r[key] for r in peer], target)

    name = FORMS[form]
    if workload.name == "single":
        what = f"1 request, {name}, whole call"
        report.summary.append(ratio(what, "output_tokens_per_s", "transformers", SINGLE_TARGETS[form]))
        what = f"1 request, {name}, decode only"
        report.summary.append(ratio(what, "decode_tokens_per_s", "transformers", None))
    else:
        what = f"{len(workload.prompts)} mixed requests, {name}, whole call"
        report.summary.append(ratio(what, "output_tokens_per_s", "transformers, static batch", MIXED_TARGET))
    agreement = equal_tokens(ours[0]["token_ids"], peer[0]["token_ids"])
    report.settings.setdefault("greedy_agreement", {})[f"{form}, {workload.name}"] = agreement
    report.notes.append(
        f"{name}, {workload.name}: {agreement['answers_equal']} of {agreement['answers']} greedy answers are equal; "
        f"{agreement['tokens_equal_before_first_difference']} of {agreement['tokens']} tokens before a first difference"
    )


def main() -> None:
    flags = parse_flags()
    settings = common_settings(flags)
    report = Report(NAME, "Offline generation on a CPU: fastdeploy LLM and transformers generate", settings)
    for form in flags.forms:
        run_form(report, form, flags)
    report.notes.append(
        "output tokens/s counts the tokens that were asked for; surplus rows of a static batch do not count"
    )
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
