"""The child's side of the line protocol: one JSON request a line on stdin, one JSON answer a line on stdout.

Used by every engine script, also by one that runs in another virtual environment: only the standard library here.
Libraries that print, and processes that inherit the standard streams, cannot disturb the protocol.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    """What an engine script offers."""

    def describe(self) -> dict[str, Any]:
        """Versions and settings in force, for the result file."""

    def generate(self, prompts: list[list[int]], n_outputs: list[int]) -> dict[str, Any]:
        """Greedy answers of exactly `n_outputs` tokens each, all prompts submitted at once.

        Keys of the answer: `wall_s` of the whole call; `token_ids`, a list per prompt; `decode_s`, from the first to
        the last token of the first request, or None where the engine does not tell.
        """

    def close(self) -> None:
        """End everything the engine started."""


def serve(make: Callable[[dict[str, Any]], Engine]) -> None:
    """Build the engine from the JSON settings in argv[1], answer requests until stdin ends."""
    requests = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    start_s = time.perf_counter()
    engine = make(json.loads(sys.argv[1]))
    try:
        _answer(answers, {**engine.describe(), "load_s": round(time.perf_counter() - start_s, 2)})
        for line in requests:
            request = json.loads(line)
            _answer(answers, engine.generate(request["prompts"], request["n_outputs"]))
    finally:
        engine.close()


def _answer(stream: Any, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()
