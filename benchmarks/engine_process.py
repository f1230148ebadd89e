"""The parent's side of the line protocol: one engine in a process of its own, kept alive between rounds."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
CLOSE_TIMEOUT_S = 60.0
N_LOG_LINES_SHOWN = 25


class EngineFailed(RuntimeError):
    """An engine process died or did not answer in time; the message has the end of its log."""


def child_environ(n_threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with `n_threads` OpenMP threads and log files in a temporary folder."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(n_threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FD_LOG_DIR": str(Path(tempfile.gettempdir()) / f"fastdeploy-benchmark-{os.getpid()}"),
        **(extra or {}),
    }


class EngineProcess:
    """`script` (a file beside this one) run by `python` with `settings`; use it in a `with` block.

    Raises EngineFailed from `start` and `generate`.
    """

    def __init__(
        self,
        name: str,
        script: str,
        settings: Mapping[str, Any],
        environ: Mapping[str, str],
        python: str = sys.executable,
    ) -> None:
        self.name = name
        self.description: dict[str, Any] = {}
        self._command = [python, str(HERE / script), json.dumps(settings)]
        self._environ = dict(environ)
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._log = tempfile.NamedTemporaryFile("w+", suffix=f"-{script}.log")  # noqa: SIM115 - closed in close()
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Root of the engine's process tree."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self, timeout_s: float) -> EngineProcess:
        """Start and wait until the engine takes requests."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environ,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.description = self._answer(timeout_s)
        print(f"{self.name}: {self.description}", file=sys.stderr, flush=True)
        return self

    def generate(self, prompts: list[list[int]], n_outputs: list[int], timeout_s: float = 1800.0) -> dict[str, Any]:
        """See `lines.Engine.generate`; checks that every answer has its full length."""
        assert self._process is not None and self._process.stdin is not None, "not started"
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "n_outputs": n_outputs}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("has ended") from None
        answer = self._answer(timeout_s)
        lengths = [len(ids) for ids in answer["token_ids"]]
        if lengths != n_outputs:
            raise EngineFailed(f"{self.name}: answers of {lengths} tokens, expected {n_outputs}")
        return answer

    def close(self) -> None:
        """End the engine; what is left of its process group after a minute is killed."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            print(f"{self.name}: had already ended", file=sys.stderr)
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{self.name}: did not end by itself", file=sys.stderr)
        with suppress(ProcessLookupError):  # the whole group has ended, as it should
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._log.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise self._failed(f"did not answer within {timeout_s:.0f} s") from None
        if line is None:
            raise self._failed("has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, what: str) -> EngineFailed:
        tail = "\n".join(Path(self._log.name).read_text().splitlines()[-N_LOG_LINES_SHOWN:])
        return EngineFailed(f"{self.name} {what}; the end of its log:\n{tail}")
