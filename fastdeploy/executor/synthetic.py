"""A rank that computes nothing: it takes plans, waits as long as its cost model says, and makes tokens up.

Stands where `executor.worker` does, behind the real front end, engine core, scheduler and pages. Imports no torch.
"""

from __future__ import annotations

import array
import faulthandler
import logging
import threading
import time
import zlib
from collections.abc import Collection, Sequence

from fastdeploy.config.schema import EngineConfig, SyntheticConfig
from fastdeploy.config.synthetic import DEFAULT_PAGES
from fastdeploy.engine.step import is_decode
from fastdeploy.executor.worker import CoreLink
from fastdeploy.observability.logs import setup_logging
from fastdeploy.wire.child import receive_boot
from fastdeploy.wire.messages import RankAlive, RankBoot, RankFailed, RankReady, StepPlan, StepResult

_HEARTBEAT_S = 1.0

log = logging.getLogger("fastdeploy.rank")


def fingerprint(prompt_ids: Sequence[int]) -> int:
    """A number that tells prompts apart, the same in every process."""
    return zlib.crc32(array.array("q", prompt_ids).tobytes())


def made_up_token(prompt_ids: Sequence[int], prompt_fingerprint: int, index: int, stop_ids: Collection[int]) -> int:
    """The output token number `index`: one of the prompt's, chosen by the whole prompt and `index` alone.

    Tokens that end an answer are passed over while the prompt has others.
    """
    n_prompt = len(prompt_ids)
    start = zlib.crc32(index.to_bytes(8, "little"), prompt_fingerprint) % n_prompt
    for offset in range(n_prompt):
        token_id = prompt_ids[(start + offset) % n_prompt]
        if token_id not in stop_ids:
            return token_id
    return prompt_ids[start]


def made_up_answer(prompt_ids: Sequence[int], n_tokens: int, stop_ids: Collection[int] = ()) -> list[int]:
    """The first `n_tokens` output tokens of a synthetic server, for those who check its answers."""
    seed = fingerprint(prompt_ids)
    return [made_up_token(prompt_ids, seed, index, stop_ids) for index in range(n_tokens)]


def step_s(pace: SyntheticConfig, plan: StepPlan) -> float:
    """Seconds that a step takes."""
    n_decodes = sum(map(is_decode, plan.n_tokens, plan.samples))
    n_prompt_tokens = sum(plan.n_tokens) - n_decodes
    return (pace.step_ms + pace.prompt_token_ms * n_prompt_tokens + pace.sequence_ms * n_decodes) / 1000


class _Sequence:
    """A request in a slot."""

    __slots__ = ("fingerprint", "n_output", "prompt_ids")

    def __init__(self, token_ids: list[int], n_prompt_tokens: int) -> None:
        self.prompt_ids = token_ids[:n_prompt_tokens]
        self.fingerprint = fingerprint(self.prompt_ids)
        self.n_output = len(token_ids) - n_prompt_tokens  # above 0 after a preemption


class SyntheticRunner:
    """Tokens of the requests in the slots."""

    def __init__(self, config: EngineConfig) -> None:
        self._stop_ids = frozenset(config.model.eos_token_ids)
        self._sequences: dict[int, _Sequence] = {}  # by slot

    def run(self, plan: StepPlan) -> StepResult:
        """What the step samples."""
        for start in plan.starts:
            self._sequences[start.slot] = _Sequence(start.token_ids, start.n_prompt_tokens)
        token_ids = [
            self._next(slot) if samples else -1 for slot, samples in zip(plan.slots, plan.samples, strict=True)
        ]
        return StepResult(plan.step, token_ids, None, None)

    def _next(self, slot: int) -> int:
        sequence = self._sequences[slot]
        index, sequence.n_output = sequence.n_output, sequence.n_output + 1
        return made_up_token(sequence.prompt_ids, sequence.fingerprint, index, self._stop_ids)


def main() -> None:
    """Entry point of the process."""
    boot = receive_boot(RankBoot)
    setup_logging(boot.config.log_dir, f"rank{boot.number}", console=False)
    faulthandler.enable()
    link = CoreLink(boot.connection_fd)
    try:
        _serve(boot.config, link)
    except Exception as error:
        log.exception("rank failed")
        link.send(RankFailed("EngineDeadError", f"rank {boot.number}: {type(error).__name__}: {error}"))


def _serve(config: EngineConfig, link: CoreLink) -> None:
    pace = config.model.synthetic
    assert pace is not None
    runner = SyntheticRunner(config)
    link.send(RankReady(config.cache.n_pages or DEFAULT_PAGES, 0, 0, {}))
    threading.Thread(target=_beat, args=(link,), name="heartbeat", daemon=True).start()
    free_at_s = 0.0  # steps run one after the other, as on a device
    while isinstance(plan := link.receive(), StepPlan):
        free_at_s = max(free_at_s, time.monotonic()) + step_s(pace, plan)
        result = runner.run(plan)
        time.sleep(max(free_at_s - time.monotonic(), 0.0))
        link.send(result)


def _beat(link: CoreLink) -> None:
    """A sleeping rank makes progress: a step may be set to take longer than a stall may."""
    n_beats = 0
    while True:
        n_beats += 1
        link.send(RankAlive(n_beats))
        time.sleep(_HEARTBEAT_S)


if __name__ == "__main__":
    main()
