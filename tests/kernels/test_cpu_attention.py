"""The paged decode attention of the C library against torch's, and the torch backend without it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.cpu.attention import PagedKernels
from fastdeploy.kernels.cpu.library import CpuKernels, KernelsUnavailableError, load_kernels, supported_isas
from fastdeploy.layers.attention.base import AttentionShape, BatchLayout
from fastdeploy.layers.attention.torch_ref import TorchAttention
from fastdeploy.layers.rotary import rotate_
from fastdeploy.runner.step import StepContext

pytestmark = pytest.mark.timeout(300)

ISAS = supported_isas() or ["none"]
# query heads, kv heads, head size, page size; 10 heads on 1 are more than the kernel takes at once
SHAPES = [(1, 1, 16, 1), (9, 3, 64, 64), (4, 2, 80, 16), (10, 1, 32, 7), (6, 6, 128, 100)]
CONTEXTS = [[1], [2, 1], [64, 65, 63], [130, 5, 129, 1, 300], list(range(1, 20))]


@pytest.fixture(scope="module", params=ISAS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    try:
        return load_kernels(request.param, tmp_path_factory.getbasetemp() / "kernels")
    except (KernelsUnavailableError, KeyError) as error:
        pytest.skip(f"no kernels here: {error}")


@pytest.fixture(autouse=True)
def no_gradients_and_one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


class Case:
    """Pages full of NaN but for the contexts, whose last token is still to be stored."""

    def __init__(self, heads: tuple[int, int, int, int], contexts: list[int], n_other_rows: int = 0) -> None:
        self.n_heads, self.n_kv, self.size, self.page = heads
        self.contexts = contexts
        self.n_rows = len(contexts) + n_other_rows
        widest = max(-(-n // self.page) for n in contexts)
        order = torch.randperm(widest * len(contexts)).numpy().astype(np.int32)
        self.table_sp = order.reshape(len(contexts), widest)
        self.pages = torch.full((len(order), 2 * self.n_kv, self.page, self.size), torch.nan)
        self.kv_s = [torch.randn(2 * self.n_kv, n, self.size) for n in contexts]
        for s, n in enumerate(contexts):
            for t in range(n - 1):
                self.pages[self.table_sp[s, t // self.page], :, t % self.page] = self.kv_s[s][:, t]
        self.rows = np.sort(torch.randperm(self.n_rows).numpy()[: len(contexts)])
        self.qkv = torch.randn(self.n_rows, self.n_heads + 2 * self.n_kv, self.size)
        self.rotation = torch.polar(
            torch.full((self.n_rows, self.size // 2), 1.1), torch.randn(self.n_rows, self.size // 2)
        )

    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """By sequence: what it attends to [heads * D], and its new keys and values [2 kv heads, D]."""
        outs, stored = [], []
        for s, row in enumerate(self.rows):
            new = self.qkv[row : row + 1].clone()
            rotate_(new[:, : self.n_heads + self.n_kv], self.rotation[row : row + 1])
            kv = self.kv_s[s].clone()
            kv[:, -1] = new[0, self.n_heads :]
            k, v = kv.repeat_interleave(self.n_heads // self.n_kv, dim=0).chunk(2)
            weight = functional.softmax((new[0, : self.n_heads, None].double() @ k.double().mT) / self.size**0.5, -1)
            outs.append((weight @ v.double()).float().flatten())
            stored.append(kv[:, -1])
        return outs, stored


@pytest.mark.parametrize("contexts", CONTEXTS, ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_paged_decode_is_attention(kernels: CpuKernels, heads: tuple[int, int, int, int], contexts: list[int]) -> None:
    case = Case(heads, contexts, n_other_rows=2)
    untouched = case.qkv.clone()
    paged = PagedKernels(kernels, *heads)
    batch = paged.prepare(case.table_sp, np.array(contexts, np.int32), case.rows)
    out = torch.full((case.n_rows, case.n_heads * case.size), torch.nan)
    paged.decode(batch, case.qkv, case.rotation, case.pages, out)
    outs, stored = case.expected()
    for s, n in enumerate(contexts):
        torch.testing.assert_close(out[case.rows[s]], outs[s], atol=2e-5, rtol=2e-5)
        last = case.pages[case.table_sp[s, (n - 1) // case.page], :, (n - 1) % case.page]
        torch.testing.assert_close(last, stored[s], atol=1e-5, rtol=1e-5)
    others = np.setdiff1d(np.arange(case.n_rows), case.rows)
    assert out[others].isnan().all()
    assert torch.equal(case.qkv, untouched)


def test_large_scores_do_not_overflow(kernels: CpuKernels) -> None:
    case = Case((4, 2, 64, 16), [40, 100])
    case.qkv *= 100
    paged = PagedKernels(kernels, 4, 2, 64, 16)
    out = torch.full((2, 256), torch.nan)
    batch = paged.prepare(case.table_sp, np.array([40, 100], np.int32), case.rows)
    paged.decode(batch, case.qkv, case.rotation, case.pages, out)
    torch.testing.assert_close(out, torch.stack(case.expected()[0]), atol=1e-3, rtol=1e-3)


def test_nan_stays_nan(kernels: CpuKernels) -> None:
    case = Case((2, 1, 16, 16), [3, 3])
    case.qkv[case.rows[0], 0, 0] = torch.nan
    paged = PagedKernels(kernels, 2, 1, 16, 16)
    out = torch.zeros(2, 32)
    paged.decode(
        paged.prepare(case.table_sp, np.array([3, 3], np.int32), case.rows), case.qkv, case.rotation, case.pages, out
    )
    assert out[case.rows[0], :16].isnan().all()
    assert not out[case.rows[1]].isnan().any()


@pytest.mark.parametrize(
    ("heads", "supported"), [((9, 3, 64), True), ((4, 2, 24), False), ((128, 1, 64), False), ((64, 1, 64), True)]
)
def test_supported_heads(heads: tuple[int, int, int], supported: bool) -> None:
    assert PagedKernels.supports(*heads) is supported


@pytest.mark.parametrize("n_new", [[1], [1, 1, 1], [5, 1, 70, 1]], ids=str)
def test_backend_is_the_same_without_the_kernel(n_new: list[int]) -> None:
    shape = AttentionShape(n_layers=1, n_heads=6, n_kv_heads=2, head_dim=32, page_tokens=16)
    found = []
    for plain in (False, True):
        torch.manual_seed(1)
        backend = TorchAttention(shape, torch.float32, torch.device("cpu"))
        if plain:
            backend.kernels = None
        pages_l = backend.allocate(40)
        pages_l[0].normal_()
        context_s = np.array(n_new, np.int32) + np.arange(len(n_new), dtype=np.int32) * 13
        table_sp = np.arange(40, dtype=np.int32)[::-1].reshape(4, 10)[: len(n_new)]
        positions = [np.arange(c - n, c) for c, n in zip(context_s, n_new, strict=True)]
        slot_t = np.concatenate([table_sp[s, p // 16] * 16 + p % 16 for s, p in enumerate(positions)]).astype(np.int64)
        layout = BatchLayout(np.array(n_new, np.int32), context_s, table_sp, slot_t)
        rotation = torch.polar(torch.ones(sum(n_new), 16), torch.randn(sum(n_new), 16))
        qkv = torch.randn(sum(n_new), 10, 32)
        found.append((backend.attend(qkv, 0, StepContext(rotation, pages_l, backend.prepare(layout))), pages_l[0]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
