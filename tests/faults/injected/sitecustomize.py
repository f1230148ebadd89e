"""Faults inside the processes of a server: Python runs this file at its start where PYTHONPATH names this folder.

What goes wrong is up to the requests: a prompt with the tokens of BROKEN, STUCK, SLOW or CORE_BROKEN, or the value
CRASH_MIN_TOKENS.
"""

import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

BROKEN = [99, 98, 99, 98, 99]  # the forward pass raises
STUCK = [99, 97, 99, 97, 99]  # it never comes back
SLOW = [99, 96, 99, 96, 99]  # each layer takes LAYER_S
LAYER_S = 0.8
CORE_BROKEN = [99, 95, 99, 95, 99]  # the engine core raises as it takes the request in
CRASH_MIN_TOKENS = 13  # the front end's detokeniser raises


def _break_runner(module: ModuleType) -> None:
    runner: Any = module.ModelRunner
    launch, count_layer = runner.launch, runner._count_layer
    layer_s = 0.0

    def faulty_launch(self: Any, plan: Any) -> Any:
        nonlocal layer_s
        ids = [token_id for start in plan.starts for token_id in start.token_ids]
        if _contains(ids, BROKEN):
            raise RuntimeError("injected: the forward pass broke")
        if _contains(ids, STUCK):
            time.sleep(3600)
        layer_s = LAYER_S if _contains(ids, SLOW) else 0.0
        return launch(self, plan)

    def slow_count_layer(self: Any, *args: Any) -> None:
        time.sleep(layer_s)
        count_layer(self, *args)

    runner.launch, runner._count_layer = faulty_launch, slow_count_layer


def _break_scheduler(module: ModuleType) -> None:
    scheduler: Any = module.Scheduler
    submit = scheduler.submit

    def faulty_submit(self: Any, request: Any, *args: Any) -> None:
        if _contains(request.prompt_ids, CORE_BROKEN):
            raise RuntimeError("injected: the scheduler broke")
        submit(self, request, *args)

    scheduler.submit = faulty_submit


def _break_detokenizer(module: ModuleType) -> None:
    detokenizer: Any = module.IncrementalDetokenizer
    push = detokenizer.push

    def faulty_push(self: Any, token_ids: Sequence[int]) -> Any:
        if self._min_tokens == CRASH_MIN_TOKENS:
            raise ZeroDivisionError("injected: the detokeniser broke")
        return push(self, token_ids)

    detokenizer.push = faulty_push


def _contains(ids: list[int], run: list[int]) -> bool:
    return any(ids[i : i + len(run)] == run for i in range(len(ids)))


class _Saboteur(MetaPathFinder):
    """Changes modules right after they were imported."""

    changes: dict[str, Callable[[ModuleType], None]] = {  # noqa: RUF012
        "fastdeploy.runner.model_runner": _break_runner,
        "fastdeploy.frontend.detokenizer": _break_detokenizer,
        "fastdeploy.engine.scheduler": _break_scheduler,
    }

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        change = self.changes.get(name)
        spec = change and PathFinder.find_spec(name, path, target)
        if not (change and spec and spec.loader):
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Saboteur())
