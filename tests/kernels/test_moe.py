"""Sorting, grouped matmuls and the whole sparse layer against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poisoned import NUMPY_WARNINGS, poisoned_memory
from torch import Tensor
from triton_device import DEVICE, DTYPES, HAS_GPU, TOLERANCE, needs_triton, relative_error

pytestmark = [pytest.mark.timeout(600), needs_triton, NUMPY_WARNINGS, pytest.mark.usefixtures("poisoned_memory")]
__all__ = ["poisoned_memory"]

K, N_LOCAL = 3, 5
needs_hopper = pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
ROUTINGS = ["random", "one_expert", "nobody_here"]


def make_routing(kind: str, n_tokens: int, n_local: int = N_LOCAL) -> tuple[Tensor, Tensor]:
    """Expert ids, n_local for those elsewhere, and weights; both [t, K]."""
    ids_tk = torch.rand(n_tokens, n_local + 1, device=DEVICE).argsort(-1)[:, :K]
    if kind == "one_expert":
        ids_tk = torch.tensor([n_local, 2, n_local], device=DEVICE).expand(n_tokens, -1)
    if kind == "nobody_here":
        ids_tk = torch.full_like(ids_tk, n_local)
    return ids_tk, torch.rand(n_tokens, K, device=DEVICE)


def way(name: str, fp8: bool = False) -> Any:
    """Tiles that send every step one way."""
    from fastdeploy.kernels.moe_few import FewTile
    from fastdeploy.kernels.moe_many import ManyTile
    from fastdeploy.kernels.moe_tiles import ANY_NUMBER, FewPlan, ManyPlan, MoEPlan, MoETiles

    bn, bk = (128, 128) if fp8 else (32, 32)
    few = FewTile(bm=16, bn=bn, bk=bk, stages=2, warps=4)
    tall = FewTile(bm=64, bn=32, bk=32, stages=2, warps=4)
    many = ManyTile(bm=64, bn=32, bk=32, stages=2, warps=4)
    plan = {
        "few": MoEPlan(few=FewPlan(gate_up=few, down=few)),
        "direct": MoEPlan(few=FewPlan(gate_up=few, down=few, direct=True)),
        "many": MoEPlan(many=ManyPlan(gate_up=many, down=many)),
        "fp8": MoEPlan(many=ManyPlan()),
        "tall": MoEPlan(few=FewPlan(gate_up=tall, down=tall)),
    }[name]
    return MoETiles({ANY_NUMBER: plan}, 4)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize("n_tokens", [0, 1, 7, 1500])
def test_sorted_pairs(n_tokens: int, n_shared: int, kind: str) -> None:
    from fastdeploy.kernels.moe_rows import sort_pairs, sort_pairs_ref

    ids_tk, _ = make_routing(kind, n_tokens)
    pair_p, offset_g = sort_pairs(ids_tk.int(), N_LOCAL, n_shared)
    expected_p, expected_g = sort_pairs_ref(ids_tk, N_LOCAL, n_shared)
    assert torch.equal(offset_g, expected_g)
    n_here = int(offset_g[-1])
    assert torch.equal(pair_p[:n_here], expected_p[:n_here])


@pytest.mark.parametrize("n_tokens", [0, 1, 9])
def test_gathered_rows(n_tokens: int) -> None:
    from fastdeploy.kernels.moe_rows import gather_rows, gather_rows_ref, sort_pairs

    ids_tk, _ = make_routing("random", n_tokens)
    x_tH = torch.randn(n_tokens, 600, device=DEVICE)
    pair_p, offset_g = sort_pairs(ids_tk, N_LOCAL)
    n_here = int(offset_g[-1])
    found = gather_rows(x_tH, pair_p, offset_g, K)[:n_here]
    assert torch.equal(found, gather_rows_ref(x_tH, pair_p, offset_g, K)[:n_here])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["few", "direct", "many"])
@pytest.mark.parametrize(
    ("n_tokens", "kind"), [(0, "random"), (1, "random"), (19, "random")] + [(9, k) for k in ROUTINGS]
)
@pytest.mark.parametrize("n_shared", [0, 2])
def test_layer(n_tokens: int, kind: str, n_shared: int, name: str, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.moe import ExpertWeights, fused_moe, fused_moe_ref

    hidden_size, width = 72, 40
    n = N_LOCAL + n_shared
    gate_up = (torch.randn(n, 2 * width, hidden_size, device=DEVICE) * 0.2).to(dtype)
    weights = ExpertWeights(gate_up, (torch.randn(n, hidden_size, width, device=DEVICE) * 0.2).to(dtype), n_shared)
    x_tH = torch.randn(n_tokens, hidden_size, device=DEVICE).to(dtype)
    ids_tk, weight_tk = make_routing(kind, n_tokens)
    found_tH = fused_moe(x_tH, weights, ids_tk, weight_tk, way(name))
    assert relative_error(found_tH, fused_moe_ref(x_tH, weights, ids_tk, weight_tk)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["few", "direct", pytest.param("fp8", marks=needs_hopper)])
@pytest.mark.parametrize(
    ("n_tokens", "kind"), [(0, "random"), (1, "random"), (5, "one_expert"), (18, "random"), (300, "random")]
)
def test_fp8_layer(n_tokens: int, kind: str, name: str) -> None:
    from fastdeploy.kernels.moe import ExpertWeights, fused_moe, fused_moe_ref
    from fastdeploy.kernels.weight_formats import quantize_blocks

    hidden_size, width, n_shared = 256, 128, 1
    n = N_LOCAL + n_shared
    gate_up, gate_up_scale = quantize_blocks(torch.randn(n, 2 * width, hidden_size, device=DEVICE) * 0.1)
    down, down_scale = quantize_blocks(torch.randn(n, hidden_size, width, device=DEVICE) * 0.1)
    weights = ExpertWeights(gate_up, down, n_shared, gate_up_scale, down_scale)
    x_tH = torch.randn(n_tokens, hidden_size, device=DEVICE, dtype=DTYPES[-1])
    ids_tk, weight_tk = make_routing(kind, n_tokens)
    if n_tokens > 100 and not HAS_GPU:
        pytest.skip("too slow in the interpreter")
    found_tH = fused_moe(x_tH, weights, ids_tk, weight_tk, way(name, fp8=True))
    # The reference keeps activations in float32: what is left is their rounding to FP8, twice, and in the interpreter
    # towards zero.
    expected_tH = fused_moe_ref(x_tH, weights, ids_tk, weight_tk)
    assert relative_error(found_tH, expected_tH) < (0.06 if HAS_GPU else 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
@pytest.mark.parametrize("name", ["few", "direct", "tall"])
@pytest.mark.parametrize(
    ("n_tokens", "kind"), [(0, "random"), (1, "random"), (40, "one_expert")] + [(5, k) for k in ROUTINGS]
)
@pytest.mark.parametrize(("hidden_size", "width", "n_shared"), [(72, 40, 0), (131, 65, 2), (256, 128, 1)])
def test_int_layer(
    n_tokens: int,
    kind: str,
    name: str,
    quantization: str,
    dtype: torch.dtype,
    hidden_size: int,
    width: int,
    n_shared: int,
) -> None:
    from fastdeploy.kernels.moe import ExpertWeights, fused_moe, fused_moe_ref
    from fastdeploy.kernels.weight_formats import quantize

    if n_tokens > 5 and name == "direct" and not HAS_GPU:
        pytest.skip("too slow in the interpreter")
    n = N_LOCAL + n_shared
    gate_up, gate_up_scale = quantize(torch.randn(n, 2 * width, hidden_size, device=DEVICE) * 0.2, quantization)
    down, down_scale = quantize(torch.randn(n, hidden_size, width, device=DEVICE) * 0.2, quantization)
    weights = ExpertWeights(gate_up, down, n_shared, gate_up_scale, down_scale)
    x_tH = torch.randn(n_tokens, hidden_size, device=DEVICE).to(dtype)
    ids_tk, weight_tk = make_routing(kind, n_tokens)
    found_tH = fused_moe(x_tH, weights, ids_tk, weight_tk, way(name))
    assert relative_error(found_tH, fused_moe_ref(x_tH, weights, ids_tk, weight_tk)) < TOLERANCE[dtype]


def test_plans_survive_their_json_form_and_cover_all_sizes() -> None:
    from fastdeploy.kernels.moe_tiles import (
        DEFAULT_FP8_PLANS,
        DEFAULT_INT_PLANS,
        DEFAULT_PLANS,
        MoETiles,
        dump_plans,
        parse_plans,
    )

    for plans in (DEFAULT_PLANS, DEFAULT_FP8_PLANS, DEFAULT_INT_PLANS):
        assert dict(parse_plans(dump_plans(plans))) == dict(plans)
        tiles = MoETiles(plans, 1)
        assert tiles.plan(1).few is not None and tiles.plan(1).few.direct
        assert tiles.plan(2).few is not None and not tiles.plan(2).few.direct
        assert (tiles.plan(1 << 20).many is None) == (plans is DEFAULT_INT_PLANS)
