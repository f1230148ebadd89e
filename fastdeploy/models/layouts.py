"""From stored names to canonical ones: where each tensor of the model lies in a checkpoint of any layout. No torch.

Canonical names and shapes are those of Hugging Face files: linear weights [out, in], one tensor per projection and per
expert; the correction bias is always `...mlp.gate.e_score_correction_bias` [E].

Stored variants understood:
- experts packed into `...experts.gate_up_proj` [E, 2M, H] (gate first) and `...experts.down_proj` [E, H, M];
- the correction bias under `mlp.moe_statics`, `mlp.gate.moe_statics` or `mlp.gate`, [1, E] or [E];
- the Paddle layout: names from `ernie.` or `model.`, linear weights [in, out], columns of `qkv_proj` (q, k, v) and
  `up_gate_proj` (gate, up) fused;
- block-wise FP8 in both layouts: a weight of byte codes and its table of scales.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from fastdeploy.errors import CheckpointError
from fastdeploy.models.weight_files import StoredTensor

# Multi-token prediction modules, tables that older exports stored, and scales of a quantised KV cache.
IGNORED = re.compile(r"^(model|ernie)\.mtp_|\.rotary_emb\.inv_freq$|\.cache[kv]_matmul\.")
CORRECTION_BIAS = re.compile(r"\.mlp\.(gate\.moe_statics|moe_statics|gate)\.e_score_correction_bias$")
PADDLE_MARK = re.compile(r"^ernie\.|\.(qkv_proj|up_gate_proj)\.|\.quant_weight$")


class Layout(Enum):
    """Which project's conventions a checkpoint follows."""

    HF = "hf"
    PADDLE = "paddle"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one canonical tensor lies.

    Take the stored tensor, select `index` on its first axis if given, transpose it if `transposed`; the canonical
    tensor of `shape` is then the rows from `first_row` on. `scale` names the stored table of block scales of FP8 codes.
    """

    stored: str
    shape: tuple[int, ...]
    index: int | None = None
    first_row: int = 0
    transposed: bool = False
    scale: str | None = None


def detect_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Tell the layout by the stored names; where those are the same in both, by the orientation of the projections."""
    if any(PADDLE_MARK.search(name) for name in shapes):
        return Layout.PADDLE
    hidden_size = shapes.get("model.embed_tokens.weight", (0, 0))[-1]
    for name, shape in shapes.items():
        if name.endswith((".k_proj.weight", ".gate_proj.weight", ".up_proj.weight")) and len(shape) == 2:
            n_first, n_second = shape
            if n_first != n_second and hidden_size in shape:
                return Layout.PADDLE if n_first == hidden_size else Layout.HF
    return Layout.HF


def find_origins(stored: Mapping[str, StoredTensor], layout: Layout, tied_embeddings: bool) -> dict[str, Origin]:
    """The origin of every canonical tensor, by canonical name. Names that nobody knows are kept as they are.

    Raises CheckpointError when two stored tensors claim one canonical name, when FP8 codes have no scales, and when a
    fused tensor cannot be split.
    """
    origins: dict[str, Origin] = {}
    for name in stored:
        if IGNORED.search(name) or _is_scale(name, stored) or (tied_embeddings and name == "lm_head.weight"):
            continue
        for canonical, origin in _origins_of(name, stored, layout):
            if canonical in origins:
                raise CheckpointError(
                    f"{stored[name].file}: {name} and {origins[canonical].stored} are both {canonical}; remove one"
                )
            origins[canonical] = origin
    return origins


def _is_scale(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    return (name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in stored) or (
        name.endswith(".weight_scale") and f"{name.removesuffix('weight_scale')}quant_weight" in stored
    )


def _origins_of(name: str, stored: Mapping[str, StoredTensor], layout: Layout) -> Iterator[tuple[str, Origin]]:
    tensor = stored[name]
    whole = Origin(name, tensor.shape, scale=_scale_of(tensor, stored))
    if CORRECTION_BIAS.search(name):
        canonical = CORRECTION_BIAS.sub(".mlp.gate.e_score_correction_bias", _with_model_prefix(name))
        one_row = len(tensor.shape) == 2 and tensor.shape[0] == 1
        yield canonical, replace(whole, shape=tensor.shape[1:], index=0) if one_row else whole
    elif layout is Layout.PADDLE:
        yield from _split_fused(name, stored, whole)
    elif name.endswith(".mlp.experts.gate_up_proj") and len(tensor.shape) == 3:
        n_experts, n_rows, n_columns = tensor.shape
        gate, up = _halves(tensor, n_rows)
        for e in range(n_experts):
            expert, prefix = replace(whole, index=e), name.removesuffix("gate_up_proj")
            yield f"{prefix}{e}.gate_proj.weight", replace(expert, shape=(gate, n_columns))
            yield f"{prefix}{e}.up_proj.weight", replace(expert, shape=(up, n_columns), first_row=gate)
    elif name.endswith(".mlp.experts.down_proj") and len(tensor.shape) == 3:
        for e in range(tensor.shape[0]):
            prefix = name.removesuffix("down_proj")
            yield f"{prefix}{e}.down_proj.weight", replace(whole, shape=tensor.shape[1:], index=e)
    else:
        yield name, whole


def _scale_of(tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> str | None:
    """The stored name of the scales of `tensor`, None for a tensor of plain numbers."""
    if tensor.name.endswith(".quant_weight"):
        scale = f"{tensor.name.removesuffix('quant_weight')}weight_scale"
    elif tensor.dtype.startswith("F8_"):
        scale = f"{tensor.name}_scale_inv"
    else:
        return None
    if scale not in stored:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} holds quantised codes, but their scales {scale} are missing"
        )
    return scale


def _split_fused(name: str, stored: Mapping[str, StoredTensor], whole: Origin) -> Iterator[tuple[str, Origin]]:
    """Canonical tensors of one tensor of the Paddle layout."""
    canonical = _with_model_prefix(name).replace(".quant_weight", ".weight")
    if len(whole.shape) == 2 and not canonical.endswith("embed_tokens.weight"):
        whole = replace(whole, shape=whole.shape[::-1], transposed=True)
    parent, _, kind = canonical.rpartition(".")
    prefix, _, projection = parent.rpartition(".")
    if projection == "qkv_proj":
        parts = zip(("q_proj", "k_proj", "v_proj"), _qkv_rows(name, stored, whole.shape[0]), strict=True)
    elif projection == "up_gate_proj":
        parts = zip(("gate_proj", "up_proj"), _halves(stored[name], whole.shape[0]), strict=True)
    else:
        yield canonical, whole
        return
    first_row = 0
    for part, n_rows in parts:
        yield f"{prefix}.{part}.{kind}", replace(whole, shape=(n_rows, *whole.shape[1:]), first_row=first_row)
        first_row += n_rows


def _qkv_rows(name: str, stored: Mapping[str, StoredTensor], n_fused: int) -> tuple[int, int, int]:
    """Rows of q, k and v among `n_fused`: o_proj takes as many inputs as q gives outputs, the rest is k and v."""
    tensor, prefix = stored[name], name.rpartition("qkv_proj.")[0]
    o_proj = stored.get(f"{prefix}o_proj.weight") or stored.get(f"{prefix}o_proj.quant_weight")
    if o_proj is None:
        raise CheckpointError(
            f"{tensor.file}: {name} cannot be split into q, k and v: {prefix}o_proj.weight is missing"
        )
    n_q = o_proj.shape[0]
    n_kv, odd = divmod(n_fused - n_q, 2)
    if odd or n_kv <= 0:
        raise CheckpointError(f"{tensor.file}: {name} has {n_fused} columns, which q ({n_q}), k and v cannot share")
    if n_kv == n_q:
        # Writers disagree for this case: plain [q | k | v], or q, k, v of each head together. No release has it.
        raise CheckpointError(
            f"{tensor.file}: {name} fuses as many key heads as query heads, whose order is not defined; "
            f"store q_proj, k_proj and v_proj separately"
        )
    return n_q, n_kv, n_kv


def _halves(tensor: StoredTensor, n_rows: int) -> tuple[int, int]:
    if n_rows % 2:
        raise CheckpointError(f"{tensor.file}: {tensor.name} {list(tensor.shape)} cannot be halved into gate and up")
    return n_rows // 2, n_rows // 2


def _with_model_prefix(name: str) -> str:
    return f"model.{name.removeprefix('ernie.')}" if name.startswith("ernie.") else name
