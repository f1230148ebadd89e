"""Where and in what a layer computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Dtype of weights and activations, and their device."""

    dtype: torch.dtype
    device: torch.device
