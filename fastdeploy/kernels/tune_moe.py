"""Measures which tiles the experts of a shape run fastest with, and writes the table that `moe_tiles` reads.

python -m fastdeploy.kernels.tune_moe --experts 64 --shared 2 --hidden-size 2560 --width 1536 --top-k 6 \
    [--quantization wint8]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from fastdeploy.config.schema import Quantization
from fastdeploy.kernels.moe import ExpertWeights, fused_moe
from fastdeploy.kernels.moe_few import FewTile
from fastdeploy.kernels.moe_many import ManyTile
from fastdeploy.kernels.moe_tiles import (
    ANY_NUMBER,
    FewPlan,
    ManyPlan,
    MoEPlan,
    MoETiles,
    dump_plans,
    table_path,
)
from fastdeploy.kernels.weight_formats import CODE_DTYPES, quantize

N_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
_MAX_FEW_TOKENS, _MIN_MANY_TOKENS, _MAX_DIRECT_TOKENS = 1024, 256, 4
_N_REPLAYS = 9
_MAX_TILE_BYTES = 220_000  # shared memory of one multiprocessor, less what is not operands


@dataclass(frozen=True, slots=True)
class Shape:
    """What is tuned: a rank's routed and shared experts, those routed to on all ranks, sizes, experts per token."""

    n_experts: int
    n_all_experts: int
    n_shared: int
    hidden_size: int
    width: int
    top_k: int
    quantization: Quantization | None


def few_tiles(n_rows: float, n_products: int, quantization: Quantization | None) -> Iterator[FewTile]:
    """Candidates for a decode matmul with `n_rows` rows per expert; gate and up are two products."""
    heights = [16] if n_rows <= 8 else [16, 32] if n_rows <= 16 else [32, 64, 128]
    if quantization == "block_wise_fp8":
        widths = (128,) if n_products == 2 else (64, 128)
        cuts = [(bn, 128, stages, warps) for bn, stages, warps in product(widths, (3, 4, 6), (4, 8))]
    elif quantization is not None:
        cuts = [(bn, 128, stages, warps) for bn, stages, warps in product((32, 64, 128), (3, 4), (4, 8))]
    else:
        cuts = [(32, 128, 4, 4), (32, 256, 3, 4), (64, 64, 4, 4), (64, 128, 3, 4), (64, 128, 4, 4), (64, 128, 3, 8)]
        cuts += [(128, 64, 3, 4), (128, 64, 3, 8), (128, 64, 4, 8)]
    for bm, (bn, bk, stages, warps) in product(heights, cuts):
        if (bm + n_products * bn) * bk * stages * (2 if quantization is None else 1) <= _MAX_TILE_BYTES:
            yield FewTile(bm=bm, bn=bn, bk=bk, stages=stages, warps=warps)


def many_tiles(n_products: int) -> Iterator[ManyTile]:
    """Candidates for a bf16 prefill matmul."""
    cuts = [(128, 256, 3, 8, 1), (128, 128, 3, 4, 2), (64, 256, 4, 4, 1), (256, 128, 3, 8, 1)]
    for (bm, bn, stages, warps, per_sm), flatten in product(cuts, (True, False)):
        width = bn // n_products
        yield ManyTile(bm=bm, bn=width, bk=64, stages=stages, warps=warps, flatten=flatten, per_sm=per_sm)


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, over replays of a CUDA graph of all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_N_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans_ms: list[float] = [a.elapsed_time(b) for a, b in pairwise(events)]
    return statistics.median(spans_ms) * 1e-3 / len(calls)


def random_weights(shape: Shape) -> ExpertWeights:
    """Normal numbers: with equal weights the tensor cores draw less power and look faster than they are."""
    n = shape.n_experts + shape.n_shared
    sizes = ((n, 2 * shape.width, shape.hidden_size), (n, shape.hidden_size, shape.width))
    gate_up, down = (torch.randn(s, device="cuda", dtype=torch.bfloat16).mul_(0.02) for s in sizes)
    if shape.quantization is None:
        return ExpertWeights(gate_up, down, shape.n_shared)
    quantized = [[quantize(w, shape.quantization) for w in stack] for stack in (gate_up, down)]
    (up8, up_scale), (down8, down_scale) = ([torch.stack(x) for x in zip(*q, strict=True)] for q in quantized)
    return ExpertWeights(up8, down8, shape.n_shared, up_scale, down_scale)


Inputs = Sequence[tuple[Tensor, Tensor, Tensor]]  # activations, expert ids, weights


class Tuner:
    """Measures plans of one shape on random tokens with random routings."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.weights = random_weights(shape)
        self.n_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def best_plan(self, n_tokens: int) -> tuple[MoEPlan, float]:
        """The fastest plan and its seconds. The two matmuls do not influence each other, so each is tuned alone."""
        inputs, plans = self._inputs(n_tokens), list[MoEPlan]()
        only_few = self.shape.quantization in ("wint8", "wint4")
        if n_tokens <= _MAX_FEW_TOKENS or only_few:
            ways = (True, False) if 1 < n_tokens <= _MAX_DIRECT_TOKENS else (n_tokens == 1,)
            plans += [self._best_few(inputs, n_tokens, direct) for direct in ways]
        if n_tokens >= _MIN_MANY_TOKENS and not only_few:
            plans.append(self._best_many(inputs))
        best = self._fastest(inputs, plans)
        return best, self._seconds(inputs, best)

    def _best_few(self, inputs: Inputs, n_tokens: int, direct: bool) -> MoEPlan:
        name, n_rows = self.shape.quantization, n_tokens * self.shape.top_k / self.shape.n_all_experts
        ups, downs = list(few_tiles(n_rows, 2, name)), list(few_tiles(n_rows, 1, name))
        first = self._fastest(inputs, [MoEPlan(few=FewPlan(gate_up=t, down=downs[0], direct=direct)) for t in ups]).few
        assert first is not None
        up = first.gate_up
        return self._fastest(inputs, [MoEPlan(few=FewPlan(gate_up=up, down=t, direct=direct)) for t in downs])

    def _best_many(self, inputs: Inputs) -> MoEPlan:
        if self.shape.quantization is not None:
            return MoEPlan(many=ManyPlan())
        ups, downs = list(many_tiles(2)), list(many_tiles(1))
        first = self._fastest(inputs, [MoEPlan(many=ManyPlan(gate_up=t, down=downs[0])) for t in ups]).many
        assert first is not None
        return self._fastest(inputs, [MoEPlan(many=ManyPlan(gate_up=first.gate_up, down=t)) for t in downs])

    def _inputs(self, n_tokens: int) -> Inputs:
        """Several, so that few experts' weights do not stay in the cache between calls."""
        k, inputs = self.shape.top_k, list[tuple[Tensor, Tensor, Tensor]]()
        for _ in range(8 if n_tokens <= 16 else 2):
            x_tH = torch.randn(n_tokens, self.shape.hidden_size, device="cuda", dtype=torch.bfloat16)
            expert_tk = torch.rand(n_tokens, self.shape.n_all_experts, device="cuda").topk(k).indices
            # n_experts stands for those of other ranks.
            inputs.append((x_tH, expert_tk.clamp_max(self.shape.n_experts), torch.rand(n_tokens, k, device="cuda")))
        return inputs

    def _fastest(self, inputs: Inputs, plans: Sequence[MoEPlan]) -> MoEPlan:
        return min(plans, key=lambda plan: self._seconds(inputs, plan))

    def _seconds(self, inputs: Inputs, plan: MoEPlan) -> float:
        tiles = MoETiles({ANY_NUMBER: plan}, self.n_sms)

        def call(x_tH: Tensor, expert_tk: Tensor, weight_tk: Tensor) -> Callable[[], Tensor]:
            return lambda: fused_moe(x_tH, self.weights, expert_tk, weight_tk, tiles)

        try:
            return seconds([call(*each) for each in inputs])
        except OutOfResources:  # a tile that this device's shared memory cannot hold is simply not a candidate
            return float("inf")


def tune(shape: Shape, n_tokens: Sequence[int] = N_TOKENS, folder: Path | None = None) -> Path:
    """Write the table of this device and `shape`; returns its path."""
    tuner, plans, us = Tuner(shape), dict[int, MoEPlan](), dict[str, float]()
    for n in tqdm(n_tokens, unit="size"):
        plan, best_s = tuner.best_plan(n)
        plans[ANY_NUMBER if n == n_tokens[-1] else n] = plan
        us[str(n)] = round(best_s * 1e6, 1)
    dtype = torch.bfloat16 if shape.quantization is None else CODE_DTYPES[shape.quantization]
    path = table_path(torch.device("cuda"), shape.n_experts, shape.hidden_size, shape.width, dtype)
    path = path if folder is None else folder / path.name
    table: dict[str, Any] = {"shape": asdict(shape), "layer_us": us, "plans": dump_plans(plans)}
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, what in {
        "--experts": "routed experts of one rank",
        "--all-experts": "routed experts of all ranks (default: of one); a step's tokens are those of all ranks then",
        "--shared": "shared experts that are computed with them",
        "--hidden-size": "hidden size",
        "--width": "width of one expert",
        "--top-k": "experts per token",
    }.items():
        parser.add_argument(flag, type=int, required=flag not in ("--shared", "--all-experts"), default=0, help=what)
    parser.add_argument(
        "--quantization", choices=get_args(Quantization), help="format of the weights (default: bfloat16)"
    )
    parser.add_argument("--folder", type=Path, help="where the table goes (default: beside the kernels)")
    args = parser.parse_args(argv)
    n_all = args.all_experts or args.experts
    shape = Shape(args.experts, n_all, args.shared, args.hidden_size, args.width, args.top_k, args.quantization)
    print(tune(shape, folder=args.folder))


if __name__ == "__main__":
    main()
