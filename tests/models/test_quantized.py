"""`--quantization wint8 | wint4` on a CPU: the model computes as one whose checkpoint holds the rounded weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import InProcessEngine, engine_config
from reference import random_prompts, worst_difference
from safetensors.torch import save_file
from tiny_models import WEIGHTS_FILE, Family, load_tensors

from fastdeploy.kernels.weight_formats import dequantize, quantize

pytestmark = pytest.mark.timeout(300)
QUANTIZED = re.compile(r"(self_attn|mlp|experts\.\d+|shared_experts)\.[a-z]+_proj\.weight$")


@pytest.mark.parametrize("name", ["wint8", "wint4"])
@pytest.mark.parametrize("family", ["ernie4_5_moe", "qwen3_moe", "llama"])
def test_same_logits_as_of_rounded_weights(
    family: Family, name: str, tiny_model: Callable[..., Path], reference: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = tiny_model(family, moe_intermediate_size=36) if family.endswith("moe") else tiny_model(family)
    rounded = tmp_path / "rounded"
    shutil.copytree(folder, rounded)
    tensors, n_rounded = load_tensors(folder), 0
    for key, weight in tensors.items():
        if QUANTIZED.search(key):
            tensors[key] = dequantize(*quantize(weight, name), weight.shape[1]).contiguous()
            n_rounded += not torch.equal(tensors[key], weight)
    save_file(tensors, rounded / WEIGHTS_FILE, {"format": "pt"})
    assert n_rounded >= 14  # two layers' projections at least
    engine = InProcessEngine(engine_config(folder, quantization=name), keep_logits=True)
    answers = engine.generate(random_prompts(range(1, 30)), max_tokens=3)
    assert worst_difference(reference(rounded), answers) < 1e-4
    assert worst_difference(reference(folder), answers) > (1e-3 if name == "wint8" else 1e-2)
