"""Rotary position embedding (Su et al., 2021) as one complex multiplication.

Here every model stores the two numbers of a rotated pair side by side (dimensions 2i and 2i + 1). Checkpoints that
pair dimension i with i + D/2 get the rows of their q and k projections reordered while loading: the dot products of
attention do not change when q and k are reordered alike, and one rotation serves all models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdeploy.config.schema import RopeShape
from fastdeploy.errors import ConfigError


def pairs_side_by_side(rows_OI: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows [heads * D, in] of a half-split projection so that pairs (i, i + D/2) become neighbours."""
    half_hpdI = rows_OI.reshape(-1, 2, head_dim // 2, rows_OI.shape[-1])
    return half_hpdI.transpose(1, 2).reshape(rows_OI.shape)


def rotations(rope: RopeShape, head_dim: int, n_positions: int, device: torch.device) -> Tensor:
    """Unit complex numbers [n_positions, D/2] (complex64), scaled by the attention factor of YaRN where it is used."""
    inverse_d, factor = _inverse_frequencies(rope, head_dim)
    angle_pd = torch.outer(torch.arange(n_positions, dtype=torch.float32), inverse_d.float())
    return torch.polar(torch.full_like(angle_pd, factor), angle_pd).to(device)


def rotate_(x_thd: Tensor, rotation_td: Tensor) -> None:
    """Rotate in place each pair of each head of x [t, h, D] by rotation [t, D/2], computed in float32."""
    if x_thd.dtype == torch.float32:
        torch.view_as_complex(x_thd.unflatten(-1, (-1, 2))).mul_(rotation_td[:, None])
        return
    pairs_thd = torch.view_as_complex(x_thd.float().unflatten(-1, (-1, 2)))
    x_thd.copy_(torch.view_as_real(pairs_thd * rotation_td[:, None]).flatten(-2))


def _inverse_frequencies(rope: RopeShape, head_dim: int) -> tuple[Tensor, float]:
    """(1 / wavelength of each pair in radians per position [D/2], amplitude of the rotation)."""
    # In this order of operations, which is that of transformers: one bit of a frequency is 0.008 radians at position
    # 131072.
    radius_d = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    base_d = 1.0 / radius_d
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return base_d, 1.0
    if kind == "linear":
        return base_d / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(base_d, scaling), 1.0
    if kind == "yarn":
        return _yarn(radius_d, rope.theta, head_dim, scaling)
    raise ConfigError(f"rope_scaling: type {kind!r} is not supported; known are default, linear, llama3, yarn")


def _llama3(base_d: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    turns_d = original / (2 * math.pi / base_d)
    keep_d = ((turns_d - low) / (high - low)).clamp(0, 1)
    return (1 - keep_d) * base_d / factor + keep_d * base_d


def _yarn(radius_d: Tensor, theta: float, head_dim: int, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): a ramp between interpolated and kept frequencies, and an amplitude."""
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])

    def pair_with_turns(n_turns: float) -> float:
        return head_dim * math.log(original / (n_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(float(scaling.get("beta_fast") or 32))), 0)
    high = min(math.ceil(pair_with_turns(float(scaling.get("beta_slow") or 1))), head_dim - 1)
    keep_d = 1 - ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scaling.get("attention_factor") is not None:
        amplitude_now = float(scaling["attention_factor"])
    elif mscale and mscale_all:
        amplitude_now = amplitude(float(mscale)) / amplitude(float(mscale_all))
    else:
        amplitude_now = amplitude(1.0)
    return 1.0 / (factor * radius_d) * (1 - keep_d) + 1.0 / radius_d * keep_d, amplitude_now
