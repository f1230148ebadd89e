"""What a run against a server comes to: the figures of the result file, and the table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastdeploy.bench.distribution import n_within, rate_over_time, summaries_ms, summary_ms
from fastdeploy.bench.load import Answer, LoadRun
from fastdeploy.bench.report import latency_table, number, table
from fastdeploy.bench.workloads import Workload

BUSY_CLIENT = 0.8  # share of a core from which on the load generator may be what limits the figures
LATE_S = 0.05
SHORT_S = 1.0  # below it, the share of a core says nothing


def figures(workload: Workload, load: Mapping[str, Any], run: LoadRun, limits_s: Mapping[str, float]) -> dict[str, Any]:
    """All that is told of a run; rates count whole answers only, over the time from the first request to the end."""
    whole = [answer for answer in run.answers if answer.error is None]
    failed = [answer for answer in run.answers if answer.error is not None]
    seconds = max(run.end_s - run.start_s, 1e-9)
    n_input, n_output = sum(one.n_input for one in whole), sum(one.n_output for one in whole)
    timings = [answer.timing for answer in whole]
    gaps_s = [np.diff(np.frombuffer(one.events_s)) for one in whole if len(one.events_s) > 1]
    cached = [one.n_cached_tokens for one in whole if one.n_cached_tokens is not None]
    n_good = n_within(timings, limits_s)
    return {
        "name": workload.name,
        "workload": workload.describe(),
        "load": load,
        "seconds": seconds,
        "n_sent": len(run.answers),
        "n_answered": len(whole),
        "n_failed": len(failed),
        "n_not_sent": len(workload.requests) - len(run.answers),
        "errors": _errors(failed),
        "stopped": run.stopped,
        "n_wrong_length": sum(one.n_output != one.request.n_output for one in whole),
        "peak_concurrency": run.peak_concurrency,
        "input_tokens": n_input,
        "output_tokens": n_output,
        "cached_tokens": sum(cached) if cached else None,
        "requests_per_s": len(whole) / seconds,
        "input_tokens_per_s": n_input / seconds,
        "output_tokens_per_s": n_output / seconds,
        "total_tokens_per_s": (n_input + n_output) / seconds,
        **summaries_ms(timings),
        "itl_ms": summary_ms(np.concatenate(gaps_s)) if gaps_s else None,
        "goodput_requests_per_s": n_good / seconds if limits_s else None,
        "goodput_share": n_good / max(len(run.answers), 1) if limits_s else None,
        "client_core_share": run.cpu_s / seconds,
        "output_tokens_over_time": _over_time(whole, run, seconds),
    }


def _errors(failed: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Per kind how many, and what the first one said."""
    first: dict[str, str] = {}
    for answer in failed:
        first.setdefault(answer.error or "", answer.error_text)
    counts = Counter(answer.error or "" for answer in failed)
    return {kind: {"count": count, "first": first[kind]} for kind, count in counts.most_common()}


def _over_time(whole: Sequence[Answer], run: LoadRun, seconds: float) -> dict[str, Any] | None:
    if not whole:
        return None
    times_s = np.concatenate([np.frombuffer(one.events_s) for one in whole]) - run.start_s
    # An event may hold several tokens, or a token no event: the tokens of an answer are spread over its events.
    weights = np.concatenate([np.full(len(one.events_s), one.n_output / len(one.events_s)) for one in whole])
    rate = rate_over_time(times_s, weights, seconds)
    return {"bucket_s": rate.bucket_s, "tokens_per_s": rate.tokens_per_s}


def raw(answer: Answer, run: LoadRun) -> dict[str, Any]:
    """One request for the result file; times count from the start of the run."""
    is_whole = answer.error is None
    times_s = np.frombuffer(answer.events_s) if answer.events_s else np.empty(0)
    return {
        "index": answer.index,
        "start_s": round(answer.start_s - run.start_s, 6),
        "end_s": round(answer.end_s - run.start_s, 6),
        "input_tokens": answer.n_input,
        "output_tokens": answer.n_output,
        "cached_tokens": answer.n_cached_tokens,
        "ttft_ms": round(answer.timing.ttft_s * 1000, 3) if is_whole else None,
        "itl_ms": [round(float(gap), 3) for gap in np.diff(times_s) * 1000],
        "error": answer.error,
        "error_text": answer.error_text,
    }


def notes(run: LoadRun, workload: Workload, exact_length: bool) -> Iterator[str]:
    """What one must know to read the figures."""
    whole = [answer for answer in run.answers if answer.error is None]
    seconds = run.end_s - run.start_s
    core_share = run.cpu_s / max(seconds, 1e-9)
    if core_share > BUSY_CLIENT and seconds > SHORT_S:
        yield f"{workload.name}: the load generator took {core_share:.0%} of a core and may be what limits the figures"
    if run.late_s and (late_s := float(np.percentile(run.late_s, 99))) > LATE_S:
        yield f"{workload.name}: requests left late, by {late_s * 1000:.0f} ms at p99: the load generator is too slow"
    if any(not answer.counted_by_server for answer in whole):
        yield "the server sends no usage: output tokens are counted as events, input tokens as they were asked for"
    n_wrong = sum(answer.n_output != answer.request.n_output for answer in whole)
    if n_wrong:
        why = "" if exact_length else " (--no-exact-length)"
        yield f"{workload.name}: {n_wrong} answers have another length than was asked for{why}"
    n_cached = sum(answer.n_cached_tokens or 0 for answer in whole)
    if n_cached and not workload.timed:
        share = n_cached / max(sum(answer.n_input for answer in whole), 1)
        yield f"{workload.name}: {share:.0%} of the input was in the prefix cache (--workload-seed: new prompts)"
    n_held = sum(len(answer.events_s) < answer.n_output for answer in whole)
    if n_held:
        yield f"{workload.name}: {n_held} answers had fewer events than tokens: ITL is between events"


def shown(result: Mapping[str, Any]) -> str:
    """The table of one workload."""
    load = result["load"]
    how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in load.items() if name != "mode")
    rows = [
        (f"{result['name']}: {load['mode']}, {how}", ""),
        ("requests sent / answered / failed", f"{result['n_sent']} / {result['n_answered']} / {result['n_failed']}"),
        ("seconds", number(result["seconds"])),
        ("most requests at once", str(result["peak_concurrency"])),
        ("requests/s", number(result["requests_per_s"])),
        ("output tokens/s", number(result["output_tokens_per_s"])),
        ("input tokens/s", number(result["input_tokens_per_s"])),
        ("input and output tokens/s", number(result["total_tokens_per_s"])),
    ]
    if result["cached_tokens"]:
        share = result["cached_tokens"] / max(result["input_tokens"], 1)
        rows.append(("input tokens found in the prefix cache", f"{share:.1%}"))
    if result["goodput_share"] is not None:
        rows.append(("goodput: requests/s within the limits", number(result["goodput_requests_per_s"])))
        rows.append(("goodput: share of the requests sent", f"{result['goodput_share']:.1%}"))
    lines = [
        table(rows),
        "",
        latency_table({name: result[name] for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")}),
    ]
    for kind, error in result["errors"].items():
        lines.append(f"failed: {error['count']} x {kind}: {error['first']}")
    if result["stopped"]:
        lines.append(f"ended early: {result['stopped']}; {result['n_not_sent']} requests were not sent")
    return "\n".join(lines)
