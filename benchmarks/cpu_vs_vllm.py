"""fastdeploy's LLM against vLLM's LLM on a CPU, on the dense Llama form of the demo model.

    python benchmarks/cpu_vs_vllm.py --vllm-python VENV/bin/python

vLLM lives in a virtual environment of its own (see README.md). It is first started once for every mode in --vllm-modes
(thread binding, eager or compiled) and each mode is timed; per case the fastest mode is the peer in the interleaved
rounds. Prefix caching is off on both sides, both turn tokens into text.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from engine_process import EngineFailed, EngineProcess
from engines import LOAD_TIMEOUT_S, add_common_flags, common_settings, fastdeploy, measure, result_path, vllm
from report import Report, compare, equal_tokens
from workload import PromptMaker, Workload

from fastdeploy.demo.model import build_demo_model

NAME = "cpu_vs_vllm"
TARGETS = {"single": 1.5, "batch16": 1.3}
MAX_SEQS = 16
N_PROBES = 2


class Mode(NamedTuple):
    """A way to start vLLM."""

    binding: str | None  # VLLM_CPU_OMP_THREADS_BIND; None leaves it out
    eager: bool


MODES = {
    "default": Mode(None, True),
    "nobind": Mode("nobind", True),
    "default-compiled": Mode(None, False),
    "nobind-compiled": Mode("nobind", False),
}


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, default_rounds=5)
    parser.add_argument("--vllm-python", required=True, help="python of the environment that has vllm-cpu")
    parser.add_argument(
        "--vllm-modes",
        nargs="+",
        choices=MODES,
        default=["default", "nobind", "default-compiled"],
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--cases", nargs="+", choices=("single", "batch16", "mixed16"), default=["single", "batch16", "mixed16"]
    )
    return parser.parse_args()


def workloads(model: Path, flags: argparse.Namespace) -> list[Workload]:
    """One request of 32 + 128 tokens, 16 of 32 + 64, 16 of 16..256 + 16..128."""
    maker, quick = PromptMaker(model), flags.quick
    cases = [
        maker.uniform("single", 1, 32, 24 if quick else 128),
        maker.uniform("batch16", MAX_SEQS, 32, 12 if quick else 64),
        maker.mixed("mixed16", MAX_SEQS, (16, 64 if quick else 256), (4, 16) if quick else (16, 128)),
    ]
    return [workload for workload in cases if workload.name in flags.cases]


def start_peers(stack: ExitStack, report: Report, model: Path, flags: argparse.Namespace) -> list[EngineProcess]:
    """vLLM in every mode that starts, all alive together. Raises EngineFailed when none does."""
    peers: list[EngineProcess] = []
    for name in flags.vllm_modes:
        mode = MODES[name]
        environ = {} if mode.binding is None else {"VLLM_CPU_OMP_THREADS_BIND": mode.binding}
        peer = vllm(f"vllm {name}", model, flags, MAX_SEQS, flags.vllm_python, mode.eager, environ)
        stack.callback(peer.close)
        try:
            peer.start(LOAD_TIMEOUT_S)
        except EngineFailed as exc:
            report.notes.append(f"vLLM did not start in mode {name}: {str(exc).splitlines()[-1]}")
            peer.close()
            continue
        report.versions[peer.name] = peer.description
        peers.append(peer)
    if not peers:
        raise EngineFailed("vLLM started in no mode:\n" + "\n".join(report.notes))
    return peers


def probe(report: Report, peers: list[EngineProcess], cases: list[Workload], n_tries: int) -> dict[str, EngineProcess]:
    """The fastest peer for each case; a mode that is chosen for none is stopped."""
    chosen: dict[str, EngineProcess] = {}
    pids = [peer.pid for peer in peers]
    for workload in cases:
        speed: dict[str, float] = {}
        for peer in peers:
            peer.generate(workload.prompts, [min(n, 8) for n in workload.n_outputs])  # warm-up
            for i in range(N_PROBES):
                one = partial(measure, report, workload, peer, pids, phase="probe", round=i)
                figures = report.undisturbed(one, n_tries)
                speed[peer.name] = max(speed.get(peer.name, 0.0), figures["output_tokens_per_s"])
        chosen[workload.name] = max(peers, key=lambda peer: speed[peer.name])
        report.settings.setdefault("probe_tokens_per_s", {})[workload.name] = speed
    for peer in peers:
        if peer not in chosen.values():
            peer.close()
    return chosen


def run(report: Report, flags: argparse.Namespace) -> None:
    """Probe vLLM, then interleaved rounds for each case."""
    model = build_demo_model(form="dense")
    cases = workloads(model, flags)
    report.settings["workloads"] = {workload.name: workload.describe() for workload in cases}
    with ExitStack() as stack:
        chosen = probe(report, start_peers(stack, report, model, flags), cases, flags.tries)
        ours = fastdeploy(model, flags, MAX_SEQS)
        stack.callback(ours.close)
        report.versions["fastdeploy engine"] = ours.start(LOAD_TIMEOUT_S).description
        pids = [ours.pid, *{peer.pid for peer in chosen.values()}]
        for workload in cases:
            peer = chosen[workload.name]
            ours.generate(workload.prompts, [min(n, 8) for n in workload.n_outputs])  # warm-up
            results: dict[str, list[dict[str, Any]]] = {ours.name: [], peer.name: []}
            for i in range(flags.rounds):
                for engine in (ours, peer):
                    one = partial(measure, report, workload, engine, pids, phase="rounds", round=i)
                    results[engine.name].append(report.undisturbed(one, flags.tries))
            summarise(report, workload, results[ours.name], results[peer.name])


def summarise(report: Report, workload: Workload, ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> None:
    """The ratios of one case, and how far the greedy answers agree."""
    n, name = len(workload.prompts), peer[0]["engine"]
    kind = "mixed requests" if workload.name.startswith("mixed") else "equal requests" if n > 1 else "request"
    keys = {"output_tokens_per_s": (f"{n} {kind}, whole call", TARGETS.get(workload.name))}
    if all("decode_tokens_per_s" in r for r in (*ours, *peer)):
        keys["decode_tokens_per_s"] = (f"{n} {kind}, decode only", None)
    for key, (what, target) in keys.items():
        line = compare(what, "output tokens/s", [r[key] for r in ours], name, [r[key] for r in peer], target)
        report.summary.append(line)
    agreement = equal_tokens(ours[0]["token_ids"], peer[0]["token_ids"])
    report.settings.setdefault("greedy_agreement", {})[workload.name] = agreement
    report.notes.append(
        f"{workload.name}: {agreement['answers_equal']} of {agreement['answers']} greedy answers are equal"
    )


def main() -> None:
    flags = parse_flags()
    settings = common_settings(flags) | {"vllm_modes": {name: MODES[name]._asdict() for name in flags.vllm_modes}}
    report = Report(NAME, "Offline generation on a CPU, dense Llama form: fastdeploy LLM and vLLM", settings)
    run(report, flags)
    report.finish(result_path(flags, NAME))


if __name__ == "__main__":
    main()
