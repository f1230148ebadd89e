"""Tiny random checkpoints of every family and layout, made with transformers, and the reference model for each.

`build` writes one folder. All layouts of one family and size hold the same numbers but the FP8 ones, for which
"fp8_dequantised" and "paddle_fp8_dequantised" hold, in the HF layout, the numbers that their codes stand for.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Family = Literal["ernie4_5", "ernie4_5_moe", "llama", "qwen3", "qwen3_moe"]
Layout = Literal["hf", "sharded", "packed", "paddle", "fp8", "fp8_dequantised", "paddle_fp8", "paddle_fp8_dequantised"]
Tensors = dict[str, Tensor]

FAMILIES: tuple[Family, ...] = get_args(Family)
WEIGHTS_FILE = "model.safetensors"
BLOCK = 128
FP8_MAX = 448.0

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that attention and routing are far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OF_FAMILY: Mapping[Family, Mapping[str, Any]] = {
    "ernie4_5": {"head_dim": 16, "tie_word_embeddings": True},
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "tie_word_embeddings": False,
    },
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
MERGES = (
    "t h|e r|o n|a n|i n|r e|a t|e n|o u|s t|i s|i t|o r|e s|h a|n d|Ġ a|Ġ t|Ġ i|Ġ s|Ġ o|th e|in g|an d|l l|Ġ w|Ġ b"
)


def build(
    folder: Path,
    family: Family,
    layout: Layout = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tokenizer: bool = False,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a checkpoint to `folder` and return it. `sizes` are keys of the family's transformers config class.

    ERNIE's router and correction bias stay float32, whatever `dtype`. `tokenizer` adds a tokenizer of 128 ids.
    """
    if layout == "hf":
        _build_hf(folder, family, getattr(torch, dtype), seed, {**COMMON, **OF_FAMILY[family], **sizes})
    else:
        source = build(folder.with_name(f"{folder.name}-source"), family, "hf", dtype, seed=seed, **sizes)
        CONVERTERS[layout](source, folder)
        shutil.rmtree(source)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder in the HF layout, ready for inference."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def write_checkpoint(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Write single tensors, which need not make a model, and a config.json of a few keys."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False} | config
    (folder / "config.json").write_text(json.dumps(config))
    separate = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(separate, folder / WEIGHTS_FILE)
    return folder


def load_tensors(folder: Path) -> Tensors:
    """All tensors of a folder as its files name and shape them."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change config.json of `folder` in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}, indent=2))


def _build_hf(folder: Path, family: Family, dtype: torch.dtype, seed: int, values: dict[str, Any]) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(transformers.AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(noise * 0.05)  # zero by default, which would hide a missing one
            elif name.endswith(".bias") or "norm" in name:
                tensor.add_(noise * 0.1)
    model.save_pretrained(folder)
    if dtype is not torch.float32:  # only from_pretrained keeps the router in float32
        auto.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


# --- other layouts -------------------------------------------------------------------------------------------------


def _write(source: Path, folder: Path, tensors: Tensors, metadata: str = "pt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": metadata})


def _to_sharded(source: Path, folder: Path, n_shards: int = 3) -> None:
    tensors = load_tensors(source)
    _write(source, folder, {})
    (folder / WEIGHTS_FILE).unlink()
    weight_map = {name: f"model-{i % n_shards + 1:05d}-of-{n_shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _to_packed(source: Path, folder: Path) -> None:
    """The form that transformers holds in memory, ERNIE's bias path included."""
    tensors = load_tensors(source)
    packed = {
        n.replace("mlp.moe_statics", "mlp.gate.moe_statics"): t for n, t in tensors.items() if ".experts." not in n
    }
    for prefix in sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name}):
        n_experts = len([n for n in tensors if n.startswith(f"{prefix}.experts.") and n.endswith(".down_proj.weight")])

        def stack(projection: str, prefix: str = prefix, n_experts: int = n_experts) -> Tensor:
            return torch.stack([tensors[f"{prefix}.experts.{e}.{projection}.weight"] for e in range(n_experts)])

        packed[f"{prefix}.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        packed[f"{prefix}.experts.down_proj"] = stack("down_proj")
    _write(source, folder, packed)


def _fused_groups(tensors: Tensors) -> dict[str, list[str]]:
    """Names of fused [out, in] tensors of the Paddle layout, and the HF tensors whose rows they stack."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        fused = name
        for part in ("q_proj", "k_proj", "v_proj"):
            fused = fused.replace(f".{part}.", ".qkv_proj.")
        for part in ("gate_proj", "up_proj"):
            fused = fused.replace(f".{part}.", ".up_gate_proj.")
        groups.setdefault(fused, []).append(name)
    order = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for names in groups.values():
        names.sort(key=lambda name: next((i for i, part in enumerate(order) if f".{part}." in name), 0))
    return groups


def _paddle_name(name: str) -> str:
    return f"ernie.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _to_paddle(source: Path, folder: Path) -> None:
    tensors = load_tensors(source)
    stored: Tensors = {}
    for fused, parts in _fused_groups(tensors).items():
        tensor = torch.cat([tensors[name] for name in parts])
        is_linear = tensor.dim() == 2 and not fused.endswith(("embed_tokens.weight", "e_score_correction_bias"))
        stored[_paddle_name(fused)] = tensor.t() if is_linear else tensor
    _write(source, folder, stored, metadata="np")
    _write_paddle_config(folder)


def _write_paddle_config(folder: Path, **extra: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    architecture = "Ernie4_5_ForCausalLM" if architecture == "Ernie4_5ForCausalLM" else architecture
    theta = config["rope_parameters"]["rope_theta"]
    gone = ("rope_parameters", "transformers_version")
    edit_config(folder, remove=gone, architectures=[architecture], rope_theta=theta, **extra)


def quantise_blocks(weight_oi: Tensor) -> tuple[Tensor, Tensor]:
    """Block-wise FP8 of a float matrix [o, i]: codes e4m3 [o, i] and float32 scales [ceil(o / 128), ceil(i / 128)]."""
    n_rows, n_columns = weight_oi.shape
    scales = torch.ones(-(-n_rows // BLOCK), -(-n_columns // BLOCK))
    codes = torch.empty(n_rows, n_columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            amax = weight_oi[block].float().abs().max()
            scales[i, j] = amax / FP8_MAX if amax > 0 else 1.0
            codes[block] = (weight_oi[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantise_whole(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of a whole matrix, with a scale table blown up to its size."""
    n_rows, n_columns = codes.shape
    per_element = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n_rows, :n_columns]
    return codes.float() * per_element


def _is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def _to_fp8(source: Path, folder: Path) -> None:
    stored: Tensors = {}
    for name, tensor in load_tensors(source).items():
        if _is_quantised(name):
            stored[name], stored[f"{name}_scale_inv"] = quantise_blocks(tensor)
        else:
            stored[name] = tensor
    _write(source, folder, stored)
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(folder, quantization_config=scheme)


def _to_fp8_dequantised(source: Path, folder: Path) -> None:
    tensors = load_tensors(source)
    for name in filter(_is_quantised, tensors):
        tensors[name] = dequantise_whole(*quantise_blocks(tensors[name]))
    _write(source, folder, tensors)


def _to_paddle_fp8(source: Path, folder: Path) -> None:
    """Codes as I8 bytes, quantised after fusing."""
    _to_paddle(source, folder)
    stored: Tensors = {}
    for name, tensor in load_tensors(folder).items():
        if _is_quantised(name):
            codes, scales = quantise_blocks(tensor)
            stored[name.replace(".weight", ".quant_weight")] = codes.view(torch.int8)
            stored[f"{name}_scale"] = scales
        else:
            stored[name] = tensor
    _write(source, folder, stored, metadata="np")
    scheme = dict.fromkeys(("dense_quant_type", "moe_quant_type"), "block_wise_fp8")
    scheme |= {"quantization": "mix_quant", "kv_cache_quant_type": "float8_e4m3fn"}
    _write_paddle_config(folder, quantization_config=scheme)


def _to_paddle_fp8_dequantised(source: Path, folder: Path) -> None:
    tensors = load_tensors(source)
    for fused, parts in _fused_groups(tensors).items():
        if _is_quantised(fused):
            values = dequantise_whole(*quantise_blocks(torch.cat([tensors[name] for name in parts])))
            sizes = [len(tensors[name]) for name in parts]
            tensors.update(zip(parts, values.split(sizes), strict=True))
    _write(source, folder, tensors)


CONVERTERS: Mapping[Layout, Callable[[Path, Path], None]] = {
    "sharded": _to_sharded,
    "packed": _to_packed,
    "paddle": _to_paddle,
    "fp8": _to_fp8,
    "fp8_dequantised": _to_fp8_dequantised,
    "paddle_fp8": _to_paddle_fp8,
    "paddle_fp8_dequantised": _to_paddle_fp8_dequantised,
}


# --- tokenizer -----------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 128 ids: specials (0 <unk>, 1 <s>, 2 </s>, <|im_start|>, <|im_end|>), ASCII, a few merges.

    Every other byte becomes <unk>. tokenizer_config.json has a ChatML template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = ["Ċ", "Ġ", *(chr(i) for i in range(ord("!"), ord("~") + 1))]  # "\n" and " " as byte-level BPE writes them
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES.split("|"))]
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *letters, *(a + b for a, b in merges)])}
    assert len(vocab) == COMMON["vocab_size"]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
