"""Processes that stand for ranks: each keeps named objects and calls functions that a test names, all at the same time.

Processes are reused, because starting one takes far longer than a test; groups, models and exchanges are made anew.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE_S = 120.0

State = dict[str, Any]  # what a rank process keeps between calls


class RankError(Exception):
    """A call failed in a rank process; the text is its traceback there."""


class RankProcesses:
    """Processes 0, 1, ...; as many as were ever asked for."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def call(self, function: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """`function(state, *arguments[i])` in process i, in all of them at once; raises RankError if any raised."""
        self.start(len(arguments))
        for pipe, given in zip(self._pipes, arguments, strict=False):
            pipe.send((function, given))
        return self.results(len(arguments))

    def start(self, n: int) -> None:
        """Have at least n processes."""
        while len(self.processes) < n:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def send(self, i: int, function: Callable[..., Any], *given: Any) -> None:
        """Start a call in process i alone; `results` or `result` takes what it gives."""
        self._pipes[i].send((function, given))

    def results(self, n: int) -> list[Any]:
        """What the first n processes gave."""
        outcomes = [self.result(i) for i in range(n)]
        failed = [f"process {i}:\n{text}" for i, (ok, text) in enumerate(outcomes) if not ok]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in outcomes]

    def result(self, i: int) -> tuple[bool, Any]:
        """(True, what the call in process i gave) or (False, its traceback)."""
        if not self._pipes[i].poll(PATIENCE_S):
            return False, f"no answer in {PATIENCE_S:.0f} s"
        try:
            outcome: tuple[bool, Any] = self._pipes[i].recv()
        except EOFError:
            return False, "the process is gone"
        return outcome

    def stop(self) -> None:
        """End all."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    state: State = {}
    while True:
        try:
            function, given = pipe.recv()
        except EOFError:
            return
        try:
            outcome = (True, function(state, *given))
        except Exception:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
