"""What weights of fewer bits cost in accuracy.

    python benchmarks/quantization_accuracy.py [--model FOLDER] [--device cpu|cuda] [--output FILE]

Two measurements, each of every format that runs on the device:
- a whole model (the demo model, or the checkpoint in FOLDER) through `LLM`: perplexity on the text beside this file;
  on the unquantised model's greedy answers, the share of tokens that the format would have chosen as well, given the
  same tokens before; and how many tokens of its own greedy answer are the same until the first that differs;
- single layers of the sizes of ERNIE-4.5-21B-A3B with random weights: ||found - exact|| / ||exact|| of their output,
  computed by the layers of the server.

Block-wise FP8 kernels need a Hopper GPU and sizes in 128s, which the demo model does not have. Where they cannot run, a
checkpoint in that format is written and read ("weights only"): that rounds the weights alike, and no activations.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import hardware
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fastdeploy import LLM, SamplingParams
from fastdeploy.config.schema import Quantization
from fastdeploy.demo.model import build_demo_model
from fastdeploy.errors import ConfigError
from fastdeploy.kernels.weight_formats import FP8_BLOCK, dequantize, dequantize_blocks, quantize, quantize_blocks
from fastdeploy.layers.matmul import make_matmul
from fastdeploy.layers.mlp import GatedMLP
from fastdeploy.layers.moe.experts import make_experts
from fastdeploy.layers.moe.gate import Routing
from fastdeploy.layers.placement import Placement
from fastdeploy.models.checkpoint import Checkpoint
from fastdeploy.models.weights import RandomWeights
from fastdeploy.outputs import RequestOutput
from fastdeploy.wire.messages import TokenLogprobs

FORMATS: tuple[Quantization, ...] = ("block_wise_fp8", "wint8", "wint4")
OUTPUT_TOKENS = 48
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fox who",
    "To repair a bicycle tyre, first",
    "The difference between a list and a tuple in Python is",
    "In the year 1969 the first people",
    "My favourite season is autumn because",
    "The heart pumps blood through",
    "Dear Mr Miller, thank you for your letter. I am writing to",
)
# Outputs and inputs of the linear layers of ERNIE-4.5-21B-A3B, and its experts.
LINEAR_LAYERS = {"qkv": (3584, 2560), "attention output": (2560, 2560), "dense gate-up": (24576, 2560)}
HIDDEN, EXPERT_WIDTH, N_EXPERTS = 2560, 1536, 2  # experts are alike: two are enough
LAYER_ROWS = {"cpu": (64,), "cuda": (1, 64, 2048)}
_QUANTIZED = re.compile(r"\.(self_attn|mlp|experts\.\d+|shared_experts)\.\w+_proj\.weight$")


# ---- a whole model ---------------------------------------------------------------------------------------------------


def prompt_logprobs(output: RequestOutput) -> list[TokenLogprobs]:
    """Of every prompt token but the first, which nothing predicts."""
    assert output.prompt_logprobs is not None
    return [entry for entry in output.prompt_logprobs if entry is not None]


def ask(llm: LLM, prompts: list[Any], **params: Any) -> list[RequestOutput]:
    """Greedy answers of one call."""
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, ignore_eos=True, **params), use_tqdm=False)
    assert isinstance(outputs, list)
    return outputs


def measure_model(llm: LLM, reference: list[RequestOutput] | None) -> tuple[dict[str, Any], list[RequestOutput]]:
    """Figures of one format, and its greedy answers; without `reference` it is the unquantised model."""
    paragraphs = (Path(__file__).parent / "quantization_text.txt").read_text().strip().split("\n\n")
    texts = ask(llm, list(paragraphs), max_tokens=1, prompt_logprobs=1)
    logprobs = [entry.logprob for output in texts for entry in prompt_logprobs(output)]
    answers = ask(llm, list(PROMPTS), max_tokens=OUTPUT_TOKENS)
    figures: dict[str, Any] = {
        "perplexity": round(math.exp(-sum(logprobs) / len(logprobs)), 4),
        "perplexity_tokens": len(logprobs),
    }
    if reference is None:  # the measure itself: the unquantised model agrees with its own answers
        reference = answers
    fed = ask(llm, [r.prompt_token_ids + r.outputs.token_ids for r in reference], max_tokens=1, prompt_logprobs=1)
    ranks = [e.rank for output in fed for e in prompt_logprobs(output)[-OUTPUT_TOKENS:]]
    pairs = [(a.outputs.token_ids, r.outputs.token_ids) for a, r in zip(answers, reference, strict=True)]
    figures["same_choice"] = round(sum(rank == 1 for rank in ranks) / len(ranks), 4)
    figures["same_until_token"] = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), OUTPUT_TOKENS) for pair in pairs
    ]
    return figures, answers


def write_fp8_checkpoint(source: Path, folder: Path) -> None:
    """The checkpoint in `source` with its projections in block-wise FP8."""
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(str(file), "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 no mapping
                tensors[name] = stored.get_tensor(name)
    for name in [name for name in tensors if _QUANTIZED.search(name)]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensors[name])
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    Checkpoint.open(folder)


@contextmanager
def fp8_model(source: Path) -> Iterator[Path]:
    """A folder with that checkpoint, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="fd-fp8-") as folder:
        write_fp8_checkpoint(source, Path(folder))
        yield Path(folder)


def measure_formats(model: Path, device: str) -> dict[str, Any]:
    """Figures by format, the unquantised model first."""
    options: dict[str, Any] = {
        "device": device, "max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False, "seed": 0,
    }  # fmt: skip
    found: dict[str, Any] = {}
    with LLM(str(model), **options) as llm:
        found["unquantised"], reference = measure_model(llm, None)
        found["unquantised"]["dtype"] = llm.config.model.dtype
    print("unquantised", found["unquantised"], flush=True)
    for name in FORMATS:
        started = time.monotonic()
        try:
            with LLM(str(model), quantization=name, **options) as llm:
                figures, _ = measure_model(llm, reference)
        except ConfigError as error:
            if name != "block_wise_fp8":
                raise
            print(f"{name}: {error}; its weights only", flush=True)
            with fp8_model(model) as folder, LLM(str(folder), **options) as llm:
                figures, _ = measure_model(llm, reference)
            figures["weights_only"] = True
        found[name] = figures | {"seconds": round(time.monotonic() - started, 1)}
        print(name, found[name], flush=True)
    return found


# ---- single layers ---------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of the whole output."""
    exact = exact.double().cpu()
    return float(f"{float((found.double().cpu() - exact).norm() / exact.norm()):.4g}")


def rounded_rows(x_tI: Tensor) -> Tensor:
    """Activations as block-wise FP8 rounds them, in groups of 128 columns of a row."""
    codes, scales = quantize_blocks(x_tI[:, None])
    return dequantize_blocks(codes, scales)[:, 0]


def fp8_linear_on_cpu(x_tI: Tensor, weight_OI: Tensor) -> Tensor:
    """What the FP8 kernels compute, but for the order of additions."""
    return functional.linear(rounded_rows(x_tI), dequantize(*quantize(weight_OI, "block_wise_fp8"), weight_OI.shape[1]))


def linear_errors(place: Placement, n_rows: int) -> dict[str, float]:
    """Of each kind of linear layer."""
    generator, errors = torch.Generator().manual_seed(0), dict[str, float]()
    for layer, (n_out, n_in) in LINEAR_LAYERS.items():
        weight_OI = torch.randn(n_out, n_in, generator=generator) * 0.02
        x_tI = torch.randn(n_rows, n_in, generator=generator)
        if place.quantization == "block_wise_fp8" and place.device.type == "cpu":
            y_tO = fp8_linear_on_cpu(x_tI, weight_OI)
        else:
            x = x_tI.to(place.dtype).to(place.device)
            y_tO = make_matmul(weight_OI.to(place.dtype).to(place.device), place)(x, None)
        errors[layer] = relative_error(y_tO, functional.linear(x_tI, weight_OI))
    return errors


def expert_error(place: Placement, n_rows: int) -> float:
    """Of gated FFNs, each row passing both with weights that add up to one."""
    weights, generator = RandomWeights(28, 0), torch.Generator().manual_seed(1)
    x_tH, ids_tk = torch.randn(n_rows, HIDDEN, generator=generator), torch.tensor([[0, 1]]).expand(n_rows, -1)
    weight_tk = torch.tensor([[0.6, 0.4]]).expand(n_rows, -1).contiguous()
    exact_tH = torch.zeros_like(x_tH)
    on_cpu = Placement(torch.float32, torch.device("cpu"))
    for i in range(N_EXPERTS):
        ffn = GatedMLP(HIDDEN, EXPERT_WIDTH, on_cpu)
        ffn.load(weights, f"experts.{i}")
        exact_tH += ffn(x_tH) * weight_tk[:, i : i + 1]
    if place.quantization == "block_wise_fp8" and place.device.type == "cpu":
        found_tH = torch.zeros_like(x_tH)
        for i in range(N_EXPERTS):
            shapes = {"gate": (EXPERT_WIDTH, HIDDEN), "up": (EXPERT_WIDTH, HIDDEN), "down": (HIDDEN, EXPERT_WIDTH)}
            gate, up, down = (weights.require(f"experts.{i}.{p}_proj.weight", s).read() for p, s in shapes.items())
            h_tM = functional.silu(fp8_linear_on_cpu(x_tH, gate)) * fp8_linear_on_cpu(x_tH, up)
            found_tH += fp8_linear_on_cpu(h_tM, down) * weight_tk[:, i : i + 1]
        return relative_error(found_tH, exact_tH)
    experts = make_experts(N_EXPERTS, HIDDEN, EXPERT_WIDTH, place)
    experts.load(weights, "experts", 0)
    routing = Routing(ids_tk.contiguous().to(place.device), weight_tk.to(place.device))
    return relative_error(experts(x_tH.to(place.dtype).to(place.device), routing), exact_tH)


@torch.inference_mode()
def measure_layers(device: str) -> dict[str, Any]:
    """Relative error by format, number of rows and layer; the unquantised layer shows what its dtype alone costs."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: dict[str, Any] = {}
    for name in (None, *FORMATS):
        place = Placement(dtype, torch.device(device), quantization=name)
        for n_rows in LAYER_ROWS[device]:
            try:
                errors: dict[str, Any] = linear_errors(place, n_rows) | {"experts": expert_error(place, n_rows)}
            except ConfigError as error:  # a GPU without 8-bit floats
                errors = {"not measured": str(error)}
            found.setdefault(name or "unquantised", {})[str(n_rows)] = errors
            print(name or "unquantised", n_rows, errors, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    flags = parser.parse_args()
    load = os.getloadavg()[0]
    result = {
        "benchmark": "quantization_accuracy",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", "benchmarks/quantization_accuracy.py", *sys.argv[1:]]),
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name()} if flags.device == "cuda" else {}),
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "fastdeploy": version("fastdeploy"),
        },
        "load_before": round(load, 2),
        "layers": measure_layers(flags.device),
        "model": str(flags.model.name if flags.model else "demo model"),
        "formats": measure_formats(flags.model or build_demo_model(form="moe"), flags.device),
    }
    if flags.output:
        flags.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["formats"], indent=1))


if __name__ == "__main__":
    main()
