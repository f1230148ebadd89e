"""The C kernels over weights in panels, the router and the norm, against torch; and how the library is built."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.cpu import library
from fastdeploy.kernels.cpu.gate import PanelGate
from fastdeploy.kernels.cpu.library import (
    CpuKernels,
    KernelsUnavailableError,
    cpu_kernels,
    load_kernels,
    supported_isas,
)
from fastdeploy.kernels.cpu.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.cpu.panels import PanelFFN, PanelMatmul, to_panels
from fastdeploy.layers.linear import Linear
from fastdeploy.layers.matmul import OneDnnMatmul, PlainMatmul, make_matmul
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.packed_ffn import PackedFFN
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import StoredTensor

pytestmark = pytest.mark.timeout(300)

CPU = Placement(torch.float32, torch.device("cpu"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 15, 16, 17, 33, 100, 601]


@pytest.fixture(scope="module", params=supported_isas() or ["none"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    try:
        return load_kernels(request.param, tmp_path_factory.getbasetemp() / "kernels")
    except (KernelsUnavailableError, KeyError) as error:
        pytest.skip(f"no kernels here: {error}")


@pytest.fixture
def built() -> CpuKernels:
    found = cpu_kernels()
    if found is None:
        pytest.skip("no kernels here")
    return found


@pytest.fixture(autouse=True)
def no_gradients_and_one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch.empty hands out holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-77)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: poisoned(empty(*size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(empty_like(x)))


def panel_matmul(kernels: CpuKernels, weight_OI: Tensor) -> PanelMatmul:
    return PanelMatmul(kernels, to_panels(weight_OI[None]), weight_OI.shape[0])


def panel_ffn(kernels: CpuKernels, *weights: Tensor) -> PanelFFN:
    return PanelFFN(kernels, *map(to_panels, weights))


# ---- linear --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (17, 3), (48, 65), (0, 8), (100, 576), (960, 131)], ids=str)
def test_panels_multiply_as_torch(
    kernels: CpuKernels, sizes: tuple[int, int], dtype: torch.dtype, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI = torch.randn(sizes).to(dtype)
    bias_O = torch.randn(sizes[0])
    matmul = panel_matmul(kernels, weight_OI)
    poison(monkeypatch)
    for n_rows in ROWS:
        x_tI = torch.randn(n_rows, sizes[1])
        for bias in (None, bias_O):
            expected = functional.linear(x_tI.double(), weight_OI.double(), None if bias is None else bias.double())
            found = matmul(x_tI, bias)
            assert found.shape == (n_rows, sizes[0])
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_panels_take_rows_that_are_not_contiguous(kernels: CpuKernels) -> None:
    weight_OI, x = torch.randn(20, 12), torch.randn(5, 24)
    torch.testing.assert_close(panel_matmul(kernels, weight_OI)(x[:, ::2], None), x[:, ::2] @ weight_OI.T)


@pytest.mark.parametrize("n_out", [1, 16, 23])
def test_panels_hold_the_weight_and_zeros(n_out: int) -> None:
    weight_eOI = torch.randn(3, n_out, 5)
    panels = to_panels(weight_eOI)
    back = panels.transpose(2, 3).reshape(3, -1, 5)
    assert torch.equal(back[:, :n_out], weight_eOI)
    assert not back[:, n_out:].any()


def test_extreme_half_numbers(kernels: CpuKernels) -> None:
    """Subnormals, the largest numbers and infinity are widened as torch does."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(0, 1 << 15, 7, dtype=torch.int16)
        weight_OI = torch.cat([bits.view(dtype), -bits.view(dtype)])[:, None]
        weight_OI = weight_OI[~weight_OI.isnan()[:, 0]]
        found = panel_matmul(kernels, weight_OI)(torch.ones(1, 1), None)
        assert torch.equal(found[0], weight_OI[:, 0].float())


# ---- feed-forward --------------------------------------------------------------------------------------------------


def ffn_ref(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = (tensor.double() for tensor in (x, gate, up, down))
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 5, 3), (4, 48, 32), (8, 72, 128), (3, 33, 100)], ids=str)
def test_ffns_are_those_of_torch(
    kernels: CpuKernels,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    n_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_experts, hidden, width = sizes
    gate, up = (torch.randn(n_experts, width, hidden) / 4 for _ in range(2))
    gate, up, down = (w.to(dtype) for w in (gate, up, torch.randn(n_experts, hidden, width) / 4))
    ffn, dense = panel_ffn(kernels, gate, up, down), panel_ffn(kernels, gate[:1], up[:1], down[:1])
    poison(monkeypatch)
    for n_rows in (0, 1, 2, 5, 16, 19, 130, 1100):
        x = torch.randn(n_rows, hidden)
        k = min(3, n_experts)
        # From -1 to n_experts: ids outside belong to other ranks.
        expert_tk = torch.rand(n_rows, n_experts + 2).argsort(-1)[:, :k] - 1
        weight_tk = torch.rand(n_rows, k)
        expected = torch.zeros(n_rows, hidden, dtype=torch.float64)
        for e in range(n_experts):
            weight_t1 = (weight_tk * (expert_tk == e)).sum(-1, keepdim=True)
            expected += weight_t1 * ffn_ref(x, gate[e], up[e], down[e])
        torch.testing.assert_close(ffn(x, expert_tk, weight_tk).double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(dense(x).double(), ffn_ref(x, gate[0], up[0], down[0]), atol=1e-4, rtol=1e-4)


def test_silu_far_from_zero(kernels: CpuKernels) -> None:
    one = torch.ones(1, 1, 1)
    x = torch.tensor([-1e4, -90.0, -30.0, -1.0, -1e-20, 0.0, 1e-20, 1.0, 30.0, 90.0, 1e4])[:, None]
    torch.testing.assert_close(panel_ffn(kernels, one, one, one)(x), functional.silu(x) * x, atol=1e-6, rtol=1e-6)


# ---- router and norm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_min", [None, 0.0, 0.9])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n_experts", "k"), [(1, 1), (8, 2), (65, 6)])
def test_gate(
    kernels: CpuKernels,
    n_experts: int,
    k: int,
    with_bias: bool,
    norm_min: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight_eH = torch.randn(n_experts, 40) / 6
    bias_e = torch.randn(n_experts) / 10 if with_bias else None
    gate = PanelGate(kernels, weight_eH, bias_e, k, norm_min)
    poison(monkeypatch)
    for n_rows in (0, 1, 7, 150):
        x = torch.randn(n_rows, 40)
        score = (x @ weight_eH.T).softmax(-1)
        choice = score if bias_e is None else score + bias_e
        expected = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        weight = score.gather(-1, expected)
        if norm_min is not None:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(norm_min)
        expert_tk, weight_tk = gate(x)
        assert torch.equal(expert_tk, expected)
        torch.testing.assert_close(weight_tk, weight, atol=1e-6, rtol=1e-5)


def test_gate_takes_the_lowest_of_equals_and_survives_nan(kernels: CpuKernels) -> None:
    gate = PanelGate(kernels, torch.ones(5, 4), None, 3, 0.0)
    expert_tk, _ = gate(torch.stack([torch.ones(4), torch.full((4,), torch.nan)]))
    assert expert_tk.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("size", [1, 16, 57, 576])
def test_norm(kernels: CpuKernels, size: int, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(size)
    poison(monkeypatch)
    for n_rows in (0, 1, 3, 200):
        x, residual = torch.randn(n_rows, size), torch.randn(n_rows, size)
        torch.testing.assert_close(rms_norm(kernels, x, weight, 1e-5), functional.rms_norm(x, (size,), weight, 1e-5))
        normed, total = add_rms_norm(kernels, x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(normed, functional.rms_norm(x + residual, (size,), weight, 1e-5))


# ---- layers --------------------------------------------------------------------------------------------------------


class Held:
    """A WeightSource over tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self.tensors[name.replace(".", "_")]
        assert tensor.shape == shape

        class Stored:
            def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
                return tensor[rows or slice(None)]

        return Stored()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_keeps_16_bit_parts(built: CpuKernels, dtype: torch.dtype) -> None:
    a, b = torch.randn(6, 9).to(dtype), torch.randn(3, 9).to(dtype)
    linear = Linear(9, (6, 3), CPU)
    linear.load(Held(a_weight=a, b_weight=b), ("a", "b"), (lambda rows: rows.flip(0), None))
    x = torch.randn(4, 9)
    torch.testing.assert_close(linear(x), x @ torch.cat([a.flip(0), b]).float().T)
    assert linear.n_bytes() == 9 * 9 * 2


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16], ids=str)
def test_linear_widens_parts_of_different_dtypes(other: torch.dtype) -> None:
    a, b = torch.randn(6, 9).half(), torch.randn(3, 9).to(other)
    linear = Linear(9, (6, 3), CPU, bias=True)
    biases = {"a_bias": torch.randn(6), "b_bias": torch.randn(3)}
    linear.load(Held(a_weight=a, b_weight=b, **biases), ("a", "b"))
    x = torch.randn(4, 9)
    expected = functional.linear(x, torch.cat([a.float(), b.float()]), torch.cat(list(biases.values())))
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_ffn_loads_its_experts(built: CpuKernels, dtype: torch.dtype) -> None:
    hidden, width = 20, 6
    tensors = {}
    for e in range(4):
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            tensors[f"x_{e}_{part}_proj_weight"] = torch.randn(shape).to(dtype)
    ffn = PackedFFN(2, hidden, width, CPU)
    ffn.load(Held(**tensors), "x", 1)
    assert ffn.n_bytes() == 2 * 3 * hidden * width * dtype.itemsize
    x, weight_tk = torch.randn(3, hidden), torch.rand(3, 2)
    expert_tk = torch.tensor([[0, 1], [1, 2], [2, 2]])
    found = ffn(x, Routing(expert_tk, weight_tk))
    for t in range(3):
        expected = torch.zeros(hidden, dtype=torch.float64)
        for j in range(2):
            if (e := int(expert_tk[t, j])) < 2:
                parts = (tensors[f"x_{e + 1}_{part}_proj_weight"] for part in ("gate", "up", "down"))
                expected += weight_tk[t, j] * ffn_ref(x[t], *parts)
        torch.testing.assert_close(found[t].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_rows", [0, 1, 5, 40])
def test_every_form_multiplies_alike(n_rows: int) -> None:
    weight_OI, bias_O, x = torch.randn(24, 16), torch.randn(24), torch.randn(n_rows, 16)
    expected = functional.linear(x, weight_OI, bias_O)
    forms = [PlainMatmul(weight_OI), make_matmul(weight_OI, CPU)]
    if torch.backends.mkldnn.is_available():
        forms.append(OneDnnMatmul(weight_OI))
    for form in forms:
        torch.testing.assert_close(form(x, bias_O), expected)
        assert form.n_bytes() == weight_OI.nbytes


def test_other_placements_are_plain() -> None:
    matmul = make_matmul(torch.randn(4, 4), Placement(torch.bfloat16, torch.device("cpu")))
    assert isinstance(matmul, PlainMatmul)
    assert matmul.weight_OI.dtype == torch.bfloat16


# ---- building ------------------------------------------------------------------------------------------------------


def test_library_is_compiled_once(built: CpuKernels, tmp_path: Path) -> None:
    load_kernels(built.isa, tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    before = path.stat().st_mtime_ns
    load_kernels(built.isa, tmp_path / "new")
    assert path.stat().st_mtime_ns == before


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "default_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(library.shutil, "which", lambda _: None)
    cpu_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert cpu_kernels() is None
            assert cpu_kernels() is None
            matmul = make_matmul(torch.randn(8, 8).half(), CPU)
            assert not isinstance(matmul, PanelMatmul)
            assert matmul(torch.randn(2, 8), None).dtype == torch.float32
    finally:
        cpu_kernels.cache_clear()
    assert len([r for r in caplog.records if "no compiled CPU kernels" in r.message]) == 1


def test_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not supported_isas():
        pytest.skip("no kernels here")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(library.shutil, "which", lambda _: str(compiler))
    with pytest.raises(KernelsUnavailableError, match="out of luck"):
        load_kernels(supported_isas()[0], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_library_is_named(built: CpuKernels, tmp_path: Path) -> None:
    load_kernels(built.isa, tmp_path / "one")
    (good,) = (tmp_path / "one").iterdir()
    (tmp_path / "two").mkdir()
    bad = tmp_path / "two" / good.name
    bad.write_bytes(good.read_bytes()[:100])
    with pytest.raises(KernelsUnavailableError, match=bad.name):
        load_kernels(built.isa, tmp_path / "two")
