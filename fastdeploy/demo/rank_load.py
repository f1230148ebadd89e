"""What each data-parallel rank did, as its own /metrics tells it."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

_PATIENCE_S = 10.0
_SAMPLE = re.compile(r'^fastdeploy:(\w+?)(?:_total)?(?:\{(?:dp_rank|expert)="(\d+)"\})? (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RankLoad:
    """Tokens that a rank took in and gave out, and rows that each of its experts computed, for any rank."""

    n_prompt_tokens: int
    n_generated_tokens: int
    n_rows_of_expert: dict[int, int]


def rank_load(metrics_url: str) -> RankLoad:
    """What a server's metrics say. Raises OSError when it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy knows it
    with opener.open(metrics_url, timeout=_PATIENCE_S) as answer:
        return parse_rank_load(answer.read().decode())


def parse_rank_load(text: str) -> RankLoad:
    """From the text of a scrape."""
    plain, of_expert = {}, {}
    for name, label, value in _SAMPLE.findall(text):
        if name == "expert_tokens":
            of_expert[int(label)] = int(float(value))
        elif not label:
            plain[name] = int(float(value)) if value != "NaN" else 0
    return RankLoad(plain["prompt_tokens"], plain["generation_tokens"], of_expert)


def load_table(loads: Sequence[RankLoad]) -> list[str]:
    """A line for each rank: its tokens, and its experts with their share of all rows."""
    n_rows = max(sum(sum(load.n_rows_of_expert.values()) for load in loads), 1)
    lines = ["", f" {'':>6} {'prompt':>7} {'generated':>10}   experts here, and their share of all rows"]
    for rank, load in enumerate(loads):
        shares = "  ".join(f"{expert}: {n / n_rows:.0%}" for expert, n in sorted(load.n_rows_of_expert.items()))
        lines.append(f" rank {rank} {load.n_prompt_tokens:>7} {load.n_generated_tokens:>10}   {shares}")
    return [*lines, ""]
