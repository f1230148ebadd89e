"""Every family in every layout against transformers in float32: logits of all positions, and greedy text.

That these tests can fail is shown at the end: each known way to get a model wrong is tried, and must be noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Answer, InProcessEngine, engine_config
from reference import fed_ids, random_prompts, reference_greedy, reference_logits, worst_difference
from tiny_models import Family, Layout

from fastdeploy.config.schema import ModelShape
from fastdeploy.errors import ConfigError
from fastdeploy.layers.moe.gate import Gate, Routing
from fastdeploy.layers.moe.layer import SparseMoE
from fastdeploy.models import checkpoint
from fastdeploy.models.checkpoint import Checkpoint, TensorSource

pytestmark = pytest.mark.timeout(300)

TOLERANCE = 1e-4
NOTICED = 0.01  # a hundred times the tolerance: what a wrong model must differ by
LENGTHS = range(1, 71)
GetModel = Callable[..., Path]
GetReference = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One checkpoint: `options` are those of `tiny_models.build`."""

    family: Family
    name: str
    layout: Layout = "hf"
    reference_layout: Layout = "hf"
    options: dict[str, Any] = field(default_factory=dict)

    def folders(self, tiny_model: GetModel) -> tuple[Path, Path]:
        """The checkpoint, and the one with the same numbers that transformers reads."""
        return tuple(tiny_model(self.family, layout, **self.options) for layout in (self.layout, self.reference_layout))  # type: ignore[return-value]


def scaled(kind: str, **numbers: float) -> dict[str, Any]:
    """A rope scaling that bends the frequencies of these short models."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **numbers}}


# Several blocks in both directions, the last ones cut, and seams of fused matrices inside blocks.
FP8_SIZES = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 160}
FP8_MOE_SIZES = {**FP8_SIZES, "moe_intermediate_size": 96}
DEEP = {"num_hidden_layers": 5}

CASES = [
    Case("ernie4_5", "hf"),
    Case("ernie4_5", "sharded", "sharded"),
    Case("ernie4_5", "paddle", "paddle"),
    Case("ernie4_5", "paddle-fp8", "paddle_fp8", "paddle_fp8_dequantised", {**FP8_SIZES, "head_dim": 32}),
    Case("ernie4_5", "wide-heads", options={"head_dim": 32, "num_key_value_heads": 1}),
    Case("ernie4_5", "bias-untied", options={"use_bias": True, "tie_word_embeddings": False}),
    Case("ernie4_5", "bfloat16", options={"dtype": "bfloat16"}),
    Case("ernie4_5_moe", "hf"),
    Case("ernie4_5_moe", "sharded", "sharded"),
    Case("ernie4_5_moe", "packed", "packed"),
    Case("ernie4_5_moe", "paddle", "paddle"),
    Case("ernie4_5_moe", "fp8", "fp8", "fp8_dequantised", FP8_MOE_SIZES),
    Case("ernie4_5_moe", "paddle-fp8", "paddle_fp8", "paddle_fp8_dequantised", FP8_MOE_SIZES),
    Case("ernie4_5_moe", "no-shared-untied", options={"moe_num_shared_experts": 0, "tie_word_embeddings": False}),
    Case(
        "ernie4_5_moe",
        "no-shared-untied-paddle",
        "paddle",
        options={"moe_num_shared_experts": 0, "tie_word_embeddings": False},
    ),
    Case(
        "ernie4_5_moe",
        "some-layers-sparse",
        options={**DEEP, "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 2},
    ),
    Case("ernie4_5_moe", "bfloat16", options={"dtype": "bfloat16", "moe_k": 3}),
    Case("llama", "hf"),
    Case("llama", "sharded", "sharded"),
    Case("llama", "fp8", "fp8", "fp8_dequantised", FP8_SIZES),
    Case("llama", "linear", options=scaled("linear")),
    Case(
        "llama",
        "llama3",
        options=scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    Case("llama", "yarn", options=scaled("yarn", original_max_position_embeddings=64)),
    Case(
        "llama",
        "yarn-mscale",
        options=scaled("yarn", original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5, beta_fast=4.0),
    ),
    Case("llama", "biases", options={"attention_bias": True, "mlp_bias": True}),
    Case("llama", "tied-float16", options={"tie_word_embeddings": True, "dtype": "float16"}),
    Case("llama", "no-groups", options={"num_key_value_heads": 4}),
    Case("qwen3", "hf"),
    Case("qwen3", "sharded", "sharded"),
    Case("qwen3", "fp8", "fp8", "fp8_dequantised", {**FP8_SIZES, "head_dim": 32}),
    Case("qwen3", "wide-heads-tied", options={"head_dim": 32, "tie_word_embeddings": True}),
    Case("qwen3", "bias", options={"attention_bias": True}),
    Case("qwen3_moe", "hf"),
    Case("qwen3_moe", "sharded", "sharded"),
    Case("qwen3_moe", "packed", "packed"),
    Case("qwen3_moe", "fp8", "fp8", "fp8_dequantised", {**FP8_MOE_SIZES, "head_dim": 32}),
    Case("qwen3_moe", "not-renormalised", options={"norm_topk_prob": False, "num_experts_per_tok": 3}),
    Case("qwen3_moe", "some-layers-sparse", options={**DEEP, "decoder_sparse_step": 2, "mlp_only_layers": [1]}),
]


def prompts_of_all_lengths() -> list[list[int]]:
    """Prompts of 1 to 70 tokens without a common beginning."""
    return random_prompts(LENGTHS)


def serve(
    folder: Path, prompts: Sequence[Sequence[int]], shape: ModelShape | None = None, **limits: Any
) -> list[Answer]:
    """Three tokens for each prompt, with the logits of every position on the way."""
    engine = InProcessEngine(engine_config(folder, shape=shape, **limits), keep_logits=True)
    return engine.generate(prompts, max_tokens=3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.name}")
def test_logits_and_greedy_text(case: Case, tiny_model: GetModel, reference: GetReference) -> None:
    """Prompts whole and in chunks that start and end everywhere, beside decoding ones; then 64 tokens each."""
    folder, reference_folder = case.folders(tiny_model)
    model = reference(reference_folder)
    whole = serve(folder, prompts_of_all_lengths())
    chunked = serve(folder, prompts_of_all_lengths(), max_batched_tokens=23, page_tokens=5, max_partial_prefills=3)
    assert worst_difference(model, whole, chunked) < TOLERANCE

    prompts = random_prompts([17, 17], seed=1)
    greedy = InProcessEngine(engine_config(folder)).generate(prompts, max_tokens=64)
    assert [answer.token_ids for answer in greedy] == reference_greedy(model, prompts, 64)


def test_prefix_cache_spares_positions_and_changes_no_logit(tiny_model: GetModel, reference: GetReference) -> None:
    folder = tiny_model("ernie4_5_moe")
    engine = InProcessEngine(engine_config(folder, page_tokens=4), keep_logits=True)
    (first,) = engine.generate(random_prompts([40]), max_tokens=12)
    longer = engine.generate([fed_ids(first)[:n] for n in (9, 37, 40, 50)], max_tokens=3)
    assert [answer.n_cached_tokens for answer in longer] == [8, 36, 36, 48]
    assert worst_difference(reference(folder), [first, *longer]) < TOLERANCE


def test_biases_of_ernie_moe_are_refused(tiny_model: GetModel) -> None:
    folder = tiny_model("ernie4_5_moe", use_bias=True)
    with pytest.raises(ConfigError, match="use_bias"):
        InProcessEngine(engine_config(folder))


# ---- what the tests above would notice -----------------------------------------------------------------------------


def difference(
    tiny_model: GetModel, reference: GetReference, case: Case, change: Callable[[ModelShape], ModelShape] | None = None
) -> float:
    """How far an engine is off that is wrong in some way, or whose `shape` was changed."""
    folder, reference_folder = case.folders(tiny_model)
    shape = engine_config(folder).model.shape
    answers = serve(folder, prompts_of_all_lengths(), change(shape) if change else shape)
    return worst_difference(reference(reference_folder), answers)


def with_rope(shape: ModelShape, **changes: Any) -> ModelShape:
    return replace(shape, rope=replace(shape.rope, **changes))


def with_moe(shape: ModelShape, **changes: Any) -> ModelShape:
    assert shape.moe is not None
    return replace(shape, moe=replace(shape.moe, **changes))


WRONG_SHAPES: list[tuple[str, Family, dict[str, Any], Callable[[ModelShape], ModelShape]]] = [
    ("half-split-ernie", "ernie4_5", {}, lambda s: with_rope(s, style="half_split")),
    ("half-split-ernie-moe", "ernie4_5_moe", {}, lambda s: with_rope(s, style="half_split")),
    ("interleaved-llama", "llama", {}, lambda s: with_rope(s, style="interleaved")),
    ("interleaved-qwen3", "qwen3", {}, lambda s: with_rope(s, style="interleaved")),
    ("theta", "qwen3", {}, lambda s: with_rope(s, theta=s.rope.theta * 2)),
    ("no-scaling", "llama", scaled("linear"), lambda s: with_rope(s, scaling=None)),
    ("no-head-norms", "qwen3", {}, lambda s: replace(s, qk_norm=False)),
    ("no-biases", "llama", {"attention_bias": True}, lambda s: replace(s, attention_bias=False)),
    ("tied-head", "llama", {}, lambda s: replace(s, tied_embeddings=True)),
    ("no-correction-bias", "ernie4_5_moe", {}, lambda s: with_moe(s, has_correction_bias=False)),
    ("not-renormalised", "ernie4_5_moe", {}, lambda s: with_moe(s, renormalise=False)),
    ("renormalised", "qwen3_moe", {"norm_topk_prob": False}, lambda s: with_moe(s, renormalise=True)),
    ("no-shared-experts", "ernie4_5_moe", {}, lambda s: with_moe(s, shared_width=0)),
    ("one-expert-less", "qwen3_moe", {}, lambda s: with_moe(s, n_experts_per_token=1)),
]


@pytest.mark.parametrize(
    "family, options, change", [row[1:] for row in WRONG_SHAPES], ids=[row[0] for row in WRONG_SHAPES]
)
def test_a_wrong_shape_is_noticed(
    family: Family,
    options: dict[str, Any],
    change: Callable[[ModelShape], ModelShape],
    tiny_model: GetModel,
    reference: GetReference,
) -> None:
    assert difference(tiny_model, reference, Case(family, "hf", options=options), change) > NOTICED


def test_a_correction_bias_in_the_weights_is_noticed(
    tiny_model: GetModel, reference: GetReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def biased_weights(gate: Gate, x_tH: torch.Tensor) -> Routing:
        assert gate.bias_e is not None
        score_te = (x_tH @ gate.weight_eH.T).softmax(-1) + gate.bias_e
        weight_tk, expert_tk = score_te.topk(gate.moe.n_experts_per_token)
        return Routing(expert_tk, weight_tk / weight_tk.sum(-1, keepdim=True))

    monkeypatch.setattr(Gate, "forward", biased_weights)
    assert difference(tiny_model, reference, Case("ernie4_5_moe", "hf")) > NOTICED


@pytest.mark.parametrize("family", ["ernie4_5", "ernie4_5_moe", "qwen3_moe"])
def test_up_taken_for_gate_is_noticed(
    family: Family, tiny_model: GetModel, reference: GetReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    require, other = Checkpoint.require, {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def swapped(weights: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorSource:
        parts = [other.get(part, part) for part in name.split(".")]
        return require(weights, ".".join(parts), shape)

    monkeypatch.setattr(Checkpoint, "require", swapped)
    assert difference(tiny_model, reference, Case(family, "hf")) > NOTICED


def test_block_scales_left_out_are_noticed(
    tiny_model: GetModel, reference: GetReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_scale_only(codes_rc: torch.Tensor, scales: torch.Tensor, *_: object) -> torch.Tensor:
        return codes_rc.float() * scales.flatten()[0]

    monkeypatch.setattr(checkpoint, "dequantise_blocks", first_scale_only)
    case = Case("llama", "fp8", "fp8", "fp8_dequantised", FP8_SIZES)
    assert difference(tiny_model, reference, case) > NOTICED


def test_the_reference_itself_depends_on_the_correction_bias(tiny_model: GetModel, reference: GetReference) -> None:
    """Otherwise no test on these checkpoints could find a missing one."""
    folder = tiny_model("ernie4_5_moe")
    engine = InProcessEngine(engine_config(folder))
    biases = [module.gate.bias_e for module in engine.runner.model.modules() if isinstance(module, SparseMoE)]
    assert biases and all(bias_e is not None and bias_e.abs().min() > 1e-4 for bias_e in biases)
    model = reference(folder)
    sequence = random_prompts([70])
    with_bias = reference_logits(model, sequence)[0]
    stored = {name: p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")}
    saved = {name: p.detach().clone() for name, p in stored.items()}
    with torch.no_grad():
        for parameter in stored.values():
            parameter.zero_()
        without_bias = reference_logits(model, sequence)[0]
        for name, parameter in stored.items():
            parameter.copy_(saved[name])
    assert stored and (with_bias - without_bias).abs().max() > NOTICED
