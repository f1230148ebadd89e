"""The plain-torch layers against definitions written out naively: linear, norm, gated FFN, gate, experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.config.schema import MoEShape
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.experts import Experts
from fastdeploy.layers.moe.gate import Gate, Routing
from fastdeploy.layers.norm import RMSNorm
from fastdeploy.layers.placement import Placement

pytestmark = pytest.mark.timeout(300)

CPU = torch.device("cpu")
FLOAT32 = Placement(torch.float32, CPU)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def check_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal in float64 within what `dtype` can hold."""
    torch.testing.assert_close(found.double(), expected.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def no_gradients_and_one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@dataclass(frozen=True)
class Values:
    """A weight in memory, as a stored tensor."""

    tensor: Tensor

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        rows_taken = self.tensor[rows or slice(None)]
        return rows_taken if columns is None else rows_taken[:, columns]


@dataclass
class RandomTensors:
    """A weight source that makes up what is asked for, and remembers it under its name."""

    made: dict[str, Tensor] = field(default_factory=dict)

    def require(self, name: str, shape: tuple[int, ...]) -> Values:
        if name not in self.made:
            self.made[name] = torch.randn(shape) / shape[-1] ** 0.5
        return Values(self.made[name])


# ---- linear, norm, gated FFN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [0, 1, 2, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_sizes", [(40,), (64, 32, 32), (1,), (7, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(n_rows: int, bias: bool, out_sizes: Sequence[int], dtype: torch.dtype) -> None:
    layer, weights = Linear(48, out_sizes, Placement(dtype, CPU), bias=bias), RandomTensors()
    names = [f"part{i}" for i in range(len(out_sizes))]
    layer.load(weights, names)
    weight_OI = torch.cat([weights.made[f"{name}.weight"] for name in names])
    bias_O = torch.cat([weights.made[f"{name}.bias"] for name in names]) if bias else None
    x_tI = torch.randn(n_rows, 48).to(dtype)
    expected_tO = functional.linear(x_tI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    y_tO = layer(x_tI)
    assert y_tO.dtype is dtype and y_tO.shape == (n_rows, sum(out_sizes))
    check_close(y_tO, expected_tO, dtype)
    assert layer.n_bytes() == (sum(out_sizes) * 48 + (sum(out_sizes) if bias else 0)) * dtype.itemsize


def test_linear_takes_rows_that_are_not_contiguous() -> None:
    layer, weights = Linear(48, (40,), FLOAT32), RandomTensors()
    layer.load(weights, ["w"])
    wide_tX = torch.randn(9, 100)
    expected_tO = wide_tX[:, 30:78] @ weights.made["w.weight"].t()
    check_close(layer(wide_tX[:, 30:78]), expected_tO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm, weights = RMSNorm(32, 1e-5, Placement(dtype, CPU)), RandomTensors()
    norm.load(weights, "norm")
    x_thd = (torch.randn(5, 3, 32) * torch.tensor([1e-4, 1.0, 1e3])[:, None]).to(dtype)
    x = x_thd.double()
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights.made["norm.weight"].double()
    check_close(norm(x_thd), expected, dtype)


def naive_ffn(made: dict[str, Tensor], name: str, x_tH: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) in float64."""
    gate, up, down = (made[f"{name}.{part}_proj.weight"].double() for part in ("gate", "up", "down"))
    return (functional.silu(x_tH.double() @ gate.t()) * (x_tH.double() @ up.t())) @ down.t()


@pytest.mark.parametrize("n_tokens", [0, 1, 33])
def test_gated_ffn(n_tokens: int) -> None:
    layer, weights = GatedMLP(32, 24, FLOAT32), RandomTensors()
    layer.load(weights, "mlp")
    x_tH = torch.randn(n_tokens, 32)
    check_close(layer(x_tH), naive_ffn(weights.made, "mlp", x_tH))


# ---- gate and experts ----------------------------------------------------------------------------------------------


def moe_shape(**changes: Any) -> MoEShape:
    values: dict[str, Any] = {
        "n_experts": 8,
        "n_experts_per_token": 3,
        "expert_width": 24,
        "shared_width": 0,
        "layers": (0,),
        "has_correction_bias": True,
        "renormalise": True,
        "norm_min": 1e-12,
        "gate_in_float32": True,
    }
    return MoEShape(**values | changes)


@pytest.mark.parametrize("n_tokens", [0, 1, 50])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(n_tokens: int, has_bias: bool, renormalise: bool, dtype: torch.dtype) -> None:
    moe = moe_shape(has_correction_bias=has_bias, renormalise=renormalise)
    gate, weights = Gate(32, moe, Placement(dtype, CPU)), RandomTensors()
    gate.load(weights, "gate")
    x_tH = torch.randn(n_tokens, 32).to(dtype)
    routing = gate(x_tH)
    assert routing.expert_tk.shape == routing.weight_tk.shape == (n_tokens, 3)
    assert routing.expert_tk.dtype is torch.int64 and routing.weight_tk.dtype is dtype
    score_te = (x_tH.double() @ weights.made["gate.weight"].double().t()).softmax(-1)
    bias_e = weights.made["gate.e_score_correction_bias"] if has_bias else torch.zeros(8)
    for t in range(n_tokens):
        best_first = sorted(range(8), key=lambda e: -(score_te[t, e] + bias_e[e]).item())
        assert routing.expert_tk[t].tolist() == best_first[:3]
        expected_k = score_te[t, best_first[:3]]
        expected_k = expected_k / expected_k.sum() if renormalise else expected_k
        check_close(routing.weight_tk[t], expected_k, dtype)


def test_gate_divides_by_no_less_than_its_bound() -> None:
    gate, weights = Gate(32, moe_shape(norm_min=10.0), FLOAT32), RandomTensors()
    gate.load(weights, "gate")
    x_tH = torch.randn(4, 32)
    score_te = (x_tH @ weights.made["gate.weight"].t()).softmax(-1)
    routing = gate(x_tH)
    check_close(routing.weight_tk, score_te.gather(1, routing.expert_tk) / 10)


def random_routing(n_tokens: int, n_experts: int, n_chosen: int) -> Routing:
    """Different experts for each token, weights of any size."""
    expert_tk = torch.rand(n_tokens, n_experts).argsort(-1)[:, :n_chosen]
    return Routing(expert_tk, torch.rand(n_tokens, n_chosen))


ROUTINGS = {
    "no-token": lambda: random_routing(0, 8, 2),
    "one-token": lambda: random_routing(1, 8, 2),
    "one-expert-each": lambda: random_routing(20, 8, 1),
    "two-experts-each": lambda: random_routing(20, 8, 2),
    "all-experts": lambda: random_routing(5, 8, 8),
    "many-tokens": lambda: random_routing(300, 8, 3),
    "all-to-the-last": lambda: Routing(torch.full((9, 1), 7), torch.rand(9, 1)),
    "two-experts-only": lambda: Routing(torch.tensor([[3, 5]] * 9 + [[5, 3]] * 4), torch.rand(13, 2)),
    "weight-zero": lambda: Routing(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.0, 1.0], [0.5, 0.0]])),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_experts(name: str) -> None:
    experts, weights = Experts(8, 32, 24, FLOAT32), RandomTensors()
    experts.load(weights, "experts")
    routing = ROUTINGS[name]()
    n_tokens = len(routing.expert_tk)
    x_tH = torch.randn(n_tokens, 32)
    unchanged_tH = x_tH.clone()
    expected_tH = torch.zeros(n_tokens, 32, dtype=torch.float64)
    for t in range(n_tokens):
        for expert, weight in zip(routing.expert_tk[t].tolist(), routing.weight_tk[t].tolist(), strict=True):
            expected_tH[t] += weight * naive_ffn(weights.made, f"experts.{expert}", x_tH[t])
    y_tH = experts(x_tH, routing)
    assert y_tH.shape == (n_tokens, 32) and y_tH.dtype is torch.float32
    check_close(y_tH, expected_tH)
    assert torch.equal(x_tH, unchanged_tH)
