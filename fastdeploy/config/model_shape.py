"""What config.json and generation_config.json of a checkpoint say, checked and turned into a `ModelShape`.

Keys may be those of published files or those that transformers 5 writes. What a missing key means depends on the layout
of the checkpoint, which its tensors tell, not its config. A key that would change the mathematics is refused by name
unless it has the value that this server computes. Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from fastdeploy.config.schema import DTypeName, ModelShape, MoEShape, RopeShape
from fastdeploy.errors import ConfigError, InvalidRequest
from fastdeploy.models.layouts import Layout, detect_layout
from fastdeploy.models.weight_files import StoredTensor, read_headers
from fastdeploy.sampling_params import SamplingParams

Family = Literal["ernie4_5", "ernie4_5_moe", "llama", "qwen3", "qwen3_moe"]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "Ernie4_5ForCausalLM": "ernie4_5",
        "Ernie4_5_ForCausalLM": "ernie4_5",
        "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
        "LlamaForCausalLM": "llama",
        "Qwen3ForCausalLM": "qwen3",
        "Qwen3MoeForCausalLM": "qwen3_moe",
    }
)

# Keys of any family that this server does not compute, each with the values under which they change nothing.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "hidden_act": ("silu",),
        "use_rmsnorm": (True,),
        "compression_ratio": (1, None),
        "scale_qk_coeff": (1, None),
        "partial_rotary_factor": (1, None),
        "truncate": (True, None),
        "rope_3d": (False, None),
        "use_sliding_window": (False, None),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "moe_gate_act": ("softmax", None),
        "scoring_func": ("softmax", None),
        "routed_scaling_factor": (1, None),
        "n_group": (0, 1, None),
    }
)

# Numbers of each supported rope scaling: those that must be there, and those that may.
ROPE_SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "linear": (("factor",), ()),
        "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
        "yarn": (
            ("factor",),
            (
                "original_max_position_embeddings",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "attention_factor",
            ),
        ),
    }
)

SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one JSON object; every getter raises ConfigError naming file, key and value."""

    values: Mapping[str, Any]
    file: Path
    prefix: str = ""

    def error(self, key: str, rule: str) -> ConfigError:
        """The error that the value of `key` breaks `rule`."""
        found = repr(self.values[key]) if key in self.values else "missing"
        return ConfigError(f"{self.file}: {self.prefix}{key} = {found}: {rule}")

    def whole(self, key: str, default: int | None = None, lowest: int = 1) -> int:
        """A whole number of `lowest` or more; a missing or null key is `default`, or an error without one."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or value < lowest:
            raise self.error(key, f"must be a whole number of {lowest} or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; `default` as in `whole`."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, "must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; a missing or null key is `default`."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(key, "must be true or false")
        return value

    def indices(self, key: str, limit: int) -> frozenset[int]:
        """A list of indices below `limit`; a missing or null key is empty."""
        value = self.values.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < limit for i in value):
            raise self.error(key, f"must be a list of layer indices from 0 to {limit - 1}")
        return frozenset(value)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ConfigError when it is missing or not a JSON object."""
    return _read_json(folder / CONFIG_FILE)


def read_model_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`, which need not hold weights yet.

    Raises ConfigError for a missing or bad config.json, naming the key; CheckpointError for malformed weight files.
    """
    keys = Keys(read_config(folder), folder / CONFIG_FILE)
    stored = read_headers(folder)
    layout = _layout(keys.values, stored)
    architecture, family = _architecture(keys)
    _refuse_unsupported(keys)
    n_heads = keys.whole("num_attention_heads")
    n_kv_heads = keys.whole("num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        raise keys.error("num_key_value_heads", f"must divide num_attention_heads = {n_heads}")
    is_ernie = family in ("ernie4_5", "ernie4_5_moe")
    attention_bias = keys.flag("use_bias" if is_ernie else "attention_bias", default=False)
    if family == "ernie4_5_moe" and attention_bias:
        raise keys.error("use_bias", f"not supported for {architecture}; it must be false")
    return ModelShape(
        architecture=architecture,
        family=family,
        hidden_size=keys.whole("hidden_size"),
        n_layers=keys.whole("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=_head_dim(keys, n_heads, stored, layout),
        ffn_width=keys.whole("intermediate_size"),
        vocab_size=keys.whole("vocab_size"),
        max_positions=keys.whole("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps", default=1e-5 if is_ernie else 1e-6),
        tied_embeddings=has_tied_embeddings(keys.values, layout),
        attention_bias=attention_bias,
        mlp_bias=attention_bias if is_ernie else family == "llama" and keys.flag("mlp_bias", default=False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rope=_rope(keys, is_ernie, default_theta=500000.0 if is_ernie and layout is Layout.HF else 10000.0),
        moe=_moe(keys, family, layout, stored),
    )


def has_tied_embeddings(config: Mapping[str, Any], layout: Layout) -> bool:
    """Whether the head is the embedding. Missing in config.json, it is true for ERNIE in the HF layout alone."""
    tied = config.get("tie_word_embeddings")
    if tied is None:
        return layout is Layout.HF and _first_architecture(config).startswith("Ernie4_5")
    if type(tied) is not bool:
        raise ConfigError(f"{CONFIG_FILE}: tie_word_embeddings = {tied!r}: must be true or false")
    return tied


def checkpoint_dtype(folder: Path) -> DTypeName:
    """The floating-point type the model was published in: by config.json, else that of its embedding.

    Raises ConfigError when neither says it or the type is not supported.
    """
    config = read_config(folder)
    name = config.get("torch_dtype") or config.get("dtype")
    if name is None:
        stored_words = {"F32": "float32", "BF16": "bfloat16", "U16": "bfloat16", "F16": "float16"}
        for tensor in read_headers(folder).values():
            if tensor.name.endswith("embed_tokens.weight"):
                name = stored_words.get(tensor.dtype)
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    if name not in get_args(DTypeName):
        supported = ", ".join(get_args(DTypeName))
        raise ConfigError(f"{folder / CONFIG_FILE}: torch_dtype = {name!r}: must be one of {supported}")
    return cast(DTypeName, name)


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling parameters that generation_config.json sets, by their names in SamplingParams; empty without the file.

    Raises ConfigError when the file is not valid or a value is out of its range.
    """
    path = folder / GENERATION_FILE
    content = _read_json(path) if path.is_file() else {}
    defaults = {key: content[key] for key in SAMPLING_KEYS if content.get(key) is not None}
    try:
        SamplingParams(**defaults)
    except InvalidRequest as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return defaults


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json, then those that only config.json names; may be empty.

    Raises ConfigError when a file is not valid or an id is not a whole number of 0 or more.
    """
    found: dict[int, None] = {}
    for path in (folder / GENERATION_FILE, folder / CONFIG_FILE):
        if path.name == GENERATION_FILE and not path.is_file():
            continue
        value = _read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ConfigError(f"{path}: eos_token_id = {value!r}: must be a token id or a list of them")
        found |= dict.fromkeys(ids)
    return tuple(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}; name the folder of a checkpoint") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: is not valid JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return content


def _first_architecture(config: Mapping[str, Any]) -> str:
    match config.get("architectures"):
        case [str(name), *_]:
            return name
        case _:
            return ""


def _architecture(keys: Keys) -> tuple[str, Family]:
    architecture = _first_architecture(keys.values)
    if architecture not in FAMILIES:
        raise keys.error("architectures", f"the first must be one of {', '.join(FAMILIES)}")
    return architecture, FAMILIES[architecture]


def _layout(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Layout:
    """By the tensors; without any (random weights), by the words that only one of the projects writes."""
    if stored:
        return detect_layout({name: tensor.shape for name, tensor in stored.items()})
    is_paddle = "dtype" in config and "torch_dtype" not in config and "transformers_version" not in config
    return Layout.PADDLE if is_paddle else Layout.HF


def _refuse_unsupported(keys: Keys) -> None:
    for key, neutral in NEUTRAL_VALUES.items():
        if key in keys.values and keys.values[key] not in neutral:
            raise keys.error(key, f"not supported; it must be {neutral[0]!r} or absent")
    layer_types = keys.values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise keys.error("layer_types", "not supported; every layer must be 'full_attention'")


def _head_dim(keys: Keys, n_heads: int, stored: Mapping[str, StoredTensor], layout: Layout) -> int:
    """The key; else the inputs that o_proj has per head; else, without weights, an equal share of the hidden size."""
    width = keys.whole("hidden_size")
    for tensor in stored.values():
        if tensor.name.endswith(("self_attn.o_proj.weight", "self_attn.o_proj.quant_weight")) and tensor.shape:
            width = tensor.shape[0] if layout is Layout.PADDLE else tensor.shape[-1]
            break
    if keys.values.get("head_dim") is None and width % n_heads:
        raise keys.error("head_dim", f"must be there, because {n_heads} heads cannot share {width} columns")
    head_dim = keys.whole("head_dim", default=width // n_heads)
    if head_dim % 2:
        raise keys.error("head_dim", "must be even")
    return head_dim


def _rope(keys: Keys, is_ernie: bool, default_theta: float) -> RopeShape:
    tables = {key: keys.values[key] for key in ("rope_parameters", "rope_scaling") if keys.values.get(key)}
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise keys.error(key, "must be an object")
    if len(tables) == 2 and tables["rope_parameters"] != tables["rope_scaling"]:
        raise keys.error("rope_scaling", "differs from rope_parameters; remove one of them")
    name = next(iter(tables), "rope_scaling")
    table = Keys(tables.get(name, {}), keys.file, f"{name}.")
    theta = table.number("rope_theta", default=keys.number("rope_theta", default=default_theta))
    _refuse_unsupported(table)
    type_key = "type" if "type" in table.values and "rope_type" not in table.values else "rope_type"
    kind = table.values.get(type_key) or "default"
    scaling: dict[str, Any] | None = None
    if kind != "default":
        if kind not in tuple(ROPE_SCALINGS):
            raise table.error(type_key, f"not supported; it must be default or one of {', '.join(ROPE_SCALINGS)}")
        required, optional = ROPE_SCALINGS[kind]
        present = [key for key in optional if table.values.get(key)]
        scaling = {"rope_type": kind} | {key: table.number(key) for key in (*required, *present)}
        if kind == "yarn":
            scaling.setdefault("original_max_position_embeddings", keys.number("max_position_embeddings"))
    return RopeShape(theta=theta, style="interleaved" if is_ernie else "half_split", scaling=scaling)


def _moe(keys: Keys, family: Family, layout: Layout, stored: Mapping[str, StoredTensor]) -> MoEShape | None:
    """None for a model without sparse layers."""
    if family == "ernie4_5_moe":
        return _ernie_moe(keys, layout, stored)
    if family == "qwen3_moe":
        return _qwen3_moe(keys)
    return None


def _ernie_moe(keys: Keys, layout: Layout, stored: Mapping[str, StoredTensor]) -> MoEShape | None:
    n_layers, is_hf = keys.whole("num_hidden_layers"), layout is Layout.HF
    start = keys.whole("moe_layer_start_index", default=1 if is_hf else 0, lowest=0)
    end = keys.whole("moe_layer_end_index", default=-1, lowest=-1)
    interval = keys.whole("moe_layer_interval", default=1)
    end = n_layers - 1 if end == -1 else end
    layers = tuple(i for i in range(n_layers) if (i + 1) % interval == 0 and start <= i <= end)
    n_experts = keys.whole("moe_num_experts", lowest=0)
    if not layers or n_experts == 0:
        return None
    expert_width = keys.whole("moe_intermediate_size")
    n_shared = keys.whole("moe_num_shared_experts", default=2 if is_hf else 0, lowest=0)
    is_stored = any(name.endswith(".e_score_correction_bias") for name in stored)
    return MoEShape(
        n_experts=n_experts,
        n_experts_per_token=_top_k(keys, "moe_k", n_experts),
        expert_width=expert_width,
        shared_width=n_shared * expert_width,
        layers=layers,
        has_correction_bias=is_stored or keys.flag("moe_use_aux_free", default=is_hf),
        renormalise=True,
        norm_min=keys.number("moe_norm_min", default=1e-12),
        gate_in_float32=True,
    )


def _qwen3_moe(keys: Keys) -> MoEShape | None:
    n_layers = keys.whole("num_hidden_layers")
    step = keys.whole("decoder_sparse_step", default=1)
    dense = keys.indices("mlp_only_layers", n_layers)
    layers = tuple(i for i in range(n_layers) if i not in dense and (i + 1) % step == 0)
    n_experts = keys.whole("num_local_experts" if "num_local_experts" in keys.values else "num_experts", lowest=0)
    if not layers or n_experts == 0:
        return None
    return MoEShape(
        n_experts=n_experts,
        n_experts_per_token=_top_k(keys, "num_experts_per_tok", n_experts),
        expert_width=keys.whole("moe_intermediate_size"),
        shared_width=0,
        layers=layers,
        has_correction_bias=False,
        renormalise=keys.flag("norm_topk_prob", default=False),
        norm_min=0.0,
        gate_in_float32=False,
    )


def _top_k(keys: Keys, key: str, n_experts: int) -> int:
    top_k = keys.whole(key)
    if top_k > n_experts:
        raise keys.error(key, f"must be at most the number of experts, {n_experts}")
    return top_k
