"""Paged attention in plain torch against dense attention written out naively, and rotations against transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdeploy.config.schema import RopeShape
from fastdeploy.errors import ConfigError
from fastdeploy.layers.attention.base import AttentionBackend, AttentionShape, BatchLayout, make_attention
from fastdeploy.layers.rotary import pairs_side_by_side, rotate_, rotations
from fastdeploy.runner.step import StepContext

pytestmark = pytest.mark.timeout(300)

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def no_gradients_and_one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


# ---- attention -----------------------------------------------------------------------------------------------------

ATTENTION_SHAPES = [(4, 2, 16, 1), (4, 4, 8, 4), (6, 1, 32, 16), (9, 3, 64, 64)]  # heads, kv heads, size, page
# Each schedule is a list of steps; a step says how many new tokens each sequence gets.
SCHEDULES: dict[str, list[dict[int, int]]] = {
    "one-token": [{0: 1}],
    "one-token-each": [{0: 1, 1: 1, 2: 1}],
    "decode": [{0: 5}, {0: 1}, {0: 1}, {0: 1}],
    "decode-together": [{0: 5, 1: 9, 2: 2}, {0: 1, 1: 1, 2: 1}, {2: 1, 0: 1, 1: 1}, {1: 1}],
    "prefill": [{0: 70}],
    "prefills": [{0: 17, 1: 64, 2: 3}],
    "chunks": [{0: 16}, {0: 15}, {0: 33}, {0: 2}, {0: 1}],
    "mixed": [{0: 10, 1: 30}, {0: 1, 2: 20, 1: 1}, {2: 7, 1: 1, 3: 1, 0: 1}, {3: 5, 2: 1}],
    "uneven": [{0: 1, 1: 130, 2: 7, 3: 129, 4: 40, 5: 64}, {5: 1, 4: 1, 3: 1, 2: 1, 1: 1, 0: 1}, {0: 3, 1: 1, 3: 1}],
}


class DenseAttention:
    """The definition: every query against all keys of its sequence so far, in float64, no pages."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    def attend(self, sequence: int, qkv_thd: Tensor, first: int, rotation_pd: Tensor) -> Tensor:
        """[t, heads * D] for the new tokens of one sequence, which start at position `first`."""
        s = self.shape
        q_thd, k_thd, v_thd = qkv_thd.double().split([s.n_heads, s.n_kv_heads, s.n_kv_heads], dim=1)
        turn_t1d = rotation_pd[first : first + len(qkv_thd), None].to(torch.complex128)

        def turned(x_thd: Tensor) -> Tensor:
            pairs = torch.complex(x_thd[..., 0::2].contiguous(), x_thd[..., 1::2].contiguous()) * turn_t1d
            return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)

        q_thd = turned(q_thd)
        empty = k_thd[:0]
        self.k[sequence] = k_Chd = torch.cat([self.k.get(sequence, empty), turned(k_thd)])
        self.v[sequence] = v_Chd = torch.cat([self.v.get(sequence, empty), v_thd])
        out_thd = torch.empty_like(q_thd)
        for t in range(len(q_thd)):
            for h in range(s.n_heads):
                kv_head = h // (s.n_heads // s.n_kv_heads)
                seen = slice(0, first + t + 1)
                weights = (k_Chd[seen, kv_head] @ q_thd[t, h] / s.head_dim**0.5).softmax(-1)
                out_thd[t, h] = weights @ v_Chd[seen, kv_head]
        return out_thd.flatten(1)


class PagedRun:
    """Feeds the same random queries, keys and values to a backend, over scattered pages, and to the definition."""

    def __init__(self, shape: AttentionShape, n_pages: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype
        self.backend: AttentionBackend = make_attention("torch", shape, dtype, CPU)
        self.pages_l = self.backend.allocate(n_pages)
        for pages in self.pages_l:
            pages.copy_(torch.randn(pages.shape) * 100)  # left behind by others: must never be seen
        self.free_pages = torch.randperm(n_pages).tolist()
        self.dense = DenseAttention(shape)
        self.table: dict[int, list[int]] = {}
        self.n_context: dict[int, int] = {}
        self.rotation_pd = rotations(RopeShape(theta=10000.0, style="interleaved"), shape.head_dim, 2048, CPU)

    def step(self, n_new: dict[int, int]) -> tuple[Tensor, Tensor]:
        """What the backend and what the definition give for one step, both [t, heads * D]."""
        s, size = self.shape, self.shape.page_tokens
        positions, slots, expected = [], [], []
        qkv_thd = torch.randn(sum(n_new.values()), s.n_heads + 2 * s.n_kv_heads, s.head_dim).to(self.dtype)
        row = 0
        for sequence, n in n_new.items():
            first = self.n_context.get(sequence, 0)
            table = self.table.setdefault(sequence, [])
            while len(table) * size < first + n:
                table.append(self.free_pages.pop())
            positions += list(range(first, first + n))
            slots += [table[p // size] * size + p % size for p in range(first, first + n)]
            expected.append(self.dense.attend(sequence, qkv_thd[row : row + n], first, self.rotation_pd))
            self.n_context[sequence] = first + n
            row += n
        step = StepContext(self.rotation_pd[positions], self.pages_l, self.backend.prepare(self._layout(n_new, slots)))
        return self.backend.attend(qkv_thd, s.n_layers - 1, step), torch.cat(expected)

    def _layout(self, n_new: dict[int, int], slots: list[int]) -> BatchLayout:
        width = max(len(self.table[sequence]) for sequence in n_new)
        # Beyond a sequence's own pages a row of the table holds whatever an earlier request left there.
        table_sp = np.random.default_rng(0).integers(0, len(self.pages_l[0]), (len(n_new), width), dtype=np.int32)
        for i, sequence in enumerate(n_new):
            table_sp[i, : len(self.table[sequence])] = self.table[sequence]
        return BatchLayout(
            np.array(list(n_new.values()), np.int32),
            np.array([self.n_context[sequence] for sequence in n_new], np.int32),
            table_sp,
            np.array(slots, np.int64),
        )


def attention_shape(n_heads: int, n_kv_heads: int, head_dim: int, page_tokens: int) -> AttentionShape:
    return AttentionShape(
        n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, page_tokens=page_tokens
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("sizes", ATTENTION_SHAPES, ids=str)
def test_paged_attention_is_dense_attention(sizes: tuple[int, int, int, int], schedule: list[dict[int, int]]) -> None:
    run = PagedRun(attention_shape(*sizes), n_pages=500)
    for n_new in schedule:
        paged_tX, dense_tX = run.step(n_new)
        torch.testing.assert_close(paged_tX.double(), dense_tX, atol=1e-5, rtol=1e-5)


def test_many_sequences_of_all_lengths_decode_together() -> None:
    """Lengths so different that no backend would pad them all to the longest."""
    run = PagedRun(attention_shape(2, 1, 8, 4), n_pages=600)
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 64, 65, 90, 128, 200, 201]
    order = torch.randperm(len(lengths)).tolist()
    run.step({i: lengths[i] for i in order})
    for _ in range(3):
        paged_tX, dense_tX = run.step(dict.fromkeys(reversed(order), 1))
        torch.testing.assert_close(paged_tX.double(), dense_tX, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[1100], [30, 1025], [513, 512, 1]], ids=str)
def test_long_prompts(chunks: list[int]) -> None:
    """Longer than the rows that are masked at a time."""
    run = PagedRun(attention_shape(1, 1, 4, 64), n_pages=40)
    for n in chunks:
        paged_tX, dense_tX = run.step({0: n})
        torch.testing.assert_close(paged_tX.double(), dense_tX, atol=1e-5, rtol=1e-5)


def test_attention_in_bfloat16() -> None:
    run = PagedRun(attention_shape(4, 2, 16, 4), n_pages=100, dtype=torch.bfloat16)
    for n_new in SCHEDULES["mixed"]:
        paged_tX, dense_tX = run.step(n_new)
        assert paged_tX.dtype is torch.bfloat16
        torch.testing.assert_close(paged_tX.double(), dense_tX, atol=4e-2, rtol=4e-2)


def test_other_layers_and_other_pages_stay_as_they_are() -> None:
    run = PagedRun(attention_shape(4, 2, 16, 4), n_pages=20)
    before = [pages.clone() for pages in run.pages_l]
    run.step({0: 6})
    changed = (run.pages_l[1] != before[1]).flatten(1).any(1)
    assert torch.equal(run.pages_l[0], before[0])
    assert set(changed.nonzero().flatten().tolist()) == set(run.table[0])
    assert run.backend.page_bytes() == sum(pages[0].nbytes for pages in run.pages_l)


# ---- rotary --------------------------------------------------------------------------------------------------------

LONG = 131072
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_rotations_are_those_of_transformers(scaling: dict[str, Any] | None, theta: float) -> None:
    """Up to the last position of a long context, where one bit of a frequency would show as 0.008."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": theta, **(scaling or {})}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=LONG, rope_parameters=parameters
    )
    cos_1pd, sin_1pd = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(0, LONG, 7)[None])
    mine_pd = rotations(RopeShape(theta=theta, style="half_split", scaling=scaling), 128, LONG, CPU)[::7]
    torch.testing.assert_close(mine_pd.real, cos_1pd[0, :, :64], atol=5e-7, rtol=0)
    torch.testing.assert_close(mine_pd.imag, sin_1pd[0, :, :64], atol=5e-7, rtol=0)


def test_an_unknown_scaling_is_refused() -> None:
    shape = RopeShape(theta=10000.0, style="half_split", scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigError, match="dynamic"):
        rotations(shape, 16, 8, CPU)


def rotated(x_thd: Tensor, rotation_td: Tensor) -> Tensor:
    """A rotated copy, made beside values that must stay: the last two heads of [t, h + 2, D] are not handed over."""
    wide_thd = torch.cat([x_thd, x_thd[:, :2]], 1)
    rotate_(wide_thd[:, :-2], rotation_td)
    assert torch.equal(wide_thd[:, -2:], x_thd[:, :2])
    return wide_thd[:, :-2]


def reordered(x_thd: Tensor) -> Tensor:
    """Activations as they come out of a projection whose rows were reordered while loading."""
    features_Xt = pairs_side_by_side(x_thd.flatten(1).t(), x_thd.shape[-1])
    return features_Xt.t().reshape(x_thd.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 37])
def test_rotation_of_both_pair_orders(n_tokens: int, dtype: torch.dtype) -> None:
    """Interleaved pairs as ERNIE has them; half-split ones after the reordering that loading does."""
    from transformers.models.ernie4_5 import modeling_ernie4_5
    from transformers.models.llama import modeling_llama

    interleaved: Any = modeling_ernie4_5.apply_rotary_pos_emb
    half_split: Any = modeling_llama.apply_rotary_pos_emb
    rotation_td = rotations(RopeShape(theta=10000.0, style="interleaved"), 16, 50, CPU)[3 : 3 + n_tokens]
    cos_1td, sin_1td = (torch.cat([part, part], -1)[None] for part in (rotation_td.real, rotation_td.imag))
    q_thd, k_thd = torch.randn(n_tokens, 4, 16).to(dtype), torch.randn(n_tokens, 2, 16).to(dtype)
    q_1htd, k_1htd = q_thd.float().transpose(0, 1)[None], k_thd.float().transpose(0, 1)[None]
    within = TOLERANCE[dtype]
    for mine_thd, theirs in zip((q_thd, k_thd), interleaved(q_1htd, k_1htd, cos_1td, sin_1td), strict=True):
        found_thd = rotated(mine_thd, rotation_td)
        assert found_thd.dtype is dtype
        torch.testing.assert_close(found_thd.float(), theirs[0].transpose(0, 1), atol=within, rtol=within)
    for mine_thd, theirs in zip((q_thd, k_thd), half_split(q_1htd, k_1htd, cos_1td, sin_1td), strict=True):
        found_thd = rotated(reordered(mine_thd), rotation_td)
        torch.testing.assert_close(found_thd.float(), reordered(theirs[0].transpose(0, 1)), atol=within, rtol=within)


def test_rotation_of_no_token() -> None:
    rotate_(torch.empty(0, 4, 16), torch.empty(0, 8, dtype=torch.complex64))
