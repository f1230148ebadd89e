"""Where a step's time goes on a GPU: the engine's scheduler and runner in one process, under the torch profiler.

python benchmarks/gpu_profile.py MODEL [--quantization block_wise_fp8] [--decode 1x128,64x128,256x1024] [--prefill 4096]

For each batch and context length of `--decode`: milliseconds of a step as the engine sees it, then milliseconds on the
device and launches of each kernel in a step. For each prompt length of `--prefill`: the same of full prefill steps.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import with_measured_pages
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.runner.build import build_runner
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Submit

_CLIENT = b"profile"
_N_WARM, _N_TIMED, _N_PROFILED = 8, 30, 8
_N_SHOWN = 18  # kernels of a table


class Engine:
    """Scheduler and runner with two steps in flight."""

    def __init__(self, **options: Any) -> None:
        config = resolve(EngineArgs(device="cuda", enable_prefix_caching=False, **options))
        self.runner, stages_s = build_runner(config)
        print("built", {stage: round(seconds, 2) for stage, seconds in stages_s.items()})
        self.runner.warm_up()
        while self.runner.use_idle_time():
            pass
        self.scheduler = Scheduler(with_measured_pages(config, self.runner.n_pages))
        self._in_flight: deque[Any] = deque()
        self._n_requests = 0

    def submit(self, n_input: int, n_output: int) -> None:
        """A request of random tokens."""
        ids = np.random.default_rng(self._n_requests).integers(10, 100_000, n_input).tolist()
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=n_output).resolved({}, n_output)
        self.scheduler.submit(Submit(f"p{self._n_requests}", ids, params, 0.0), _CLIENT, time.time())
        self._n_requests += 1

    def turn(self) -> int:
        """Launch a step and commit the one before; tokens of the step launched."""
        planned, n_tokens = self.scheduler.plan(time.time()), 0
        if planned is not None:
            n_tokens = sum(planned.plan.n_tokens)
            self._in_flight.append((planned, self.runner.launch(planned.plan)))
        if self._in_flight and (planned is None or len(self._in_flight) > 1):
            oldest, read = self._in_flight.popleft()
            self.scheduler.commit(oldest, read(), time.time())
        return n_tokens

    def drain(self) -> None:
        """End all requests."""
        self.scheduler.abort([f"p{i}" for i in range(self._n_requests)])
        while self._in_flight or not self.scheduler.idle:
            self.turn()


def profiled(n_steps: int, turn: Callable[[], object]) -> None:
    """Print milliseconds a step and launches a step of each kernel."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(n_steps):
            turn()
        torch.cuda.synchronize()
    spent_us, count = defaultdict[str, float](float), Counter[str]()
    for event in found.events() or []:
        spent_us[event.name] += event.device_time
        count[event.name] += 1
    print(f"    {sum(spent_us.values()) / n_steps / 1e3:8.3f} ms  all kernels")
    for name, us in sorted(spent_us.items(), key=lambda item: -item[1])[:_N_SHOWN]:
        print(f"    {us / n_steps / 1e3:8.4f} ms {count[name] / n_steps:6.1f}x  {name[:70]}")


def decode(engine: Engine, n_seqs: int, n_context: int) -> None:
    """Steps of `n_seqs` sequences, from `n_context` tokens on."""
    for _ in range(n_seqs):
        engine.submit(n_context, _N_WARM + _N_TIMED + _N_PROFILED + 200)
    while engine.turn() != n_seqs or engine.scheduler.n_waiting:
        pass
    for _ in range(_N_WARM):
        engine.turn()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(_N_TIMED):
        engine.turn()
    torch.cuda.synchronize()
    print(f"### {n_seqs} x {n_context}: step {(time.perf_counter() - start_s) / _N_TIMED * 1e3:.3f} ms")
    profiled(_N_PROFILED, engine.turn)
    engine.drain()


def prefill(engine: Engine, n_input: int, n_batched: int) -> None:
    """Full steps of prompts of `n_input` tokens."""
    n_steps = 6
    for _ in range(n_steps * 3 * n_batched // n_input):
        engine.submit(n_input, 1)
    for _ in range(n_steps):
        engine.turn()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(n_steps):
        engine.turn()
    torch.cuda.synchronize()
    print(f"### prefill {n_batched} of {n_input}: step {(time.perf_counter() - start_s) / n_steps * 1e3:.3f} ms")
    profiled(n_steps - 2, engine.turn)
    engine.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quantization")
    parser.add_argument("--decode", default="1x128,64x128,256x128,256x1024")
    parser.add_argument("--prefill", default="4096")
    parser.add_argument("--batched", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=8192)
    args = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, quantization {args.quantization}")
    engine = Engine(
        model=args.model, quantization=args.quantization, max_num_seqs=256, max_num_batched_tokens=args.batched,
        max_model_len=args.max_model_len,
    )  # fmt: skip
    with torch.inference_mode():
        for batch in filter(None, args.decode.split(",")):
            n_seqs, n_context = map(int, batch.split("x"))
            decode(engine, n_seqs, n_context)
        for n_input in filter(None, args.prefill.split(",")):
            prefill(engine, int(n_input), args.batched)


if __name__ == "__main__":
    main()
