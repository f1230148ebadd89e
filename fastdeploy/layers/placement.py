"""Where and in what a layer computes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastdeploy.config.schema import Quantization
from fastdeploy.distributed.collectives import Peers
from fastdeploy.distributed.shared_weights import OwnMemory, WeightMemory


@dataclass(frozen=True, slots=True)
class Placement:
    """Dtype of weights and activations, their device, and the ranks that hold the other parts of the layers.

    `weights` keeps what ranks may have in common; experts that are spread are not.
    """

    dtype: torch.dtype
    device: torch.device
    peers: Peers = field(default_factory=Peers)
    weights: WeightMemory = field(default_factory=OwnMemory)
    quantization: Quantization | None = None  # of linear layers and experts, see kernels/weight_formats.py
    redundant_experts: int | None = None  # copies beside the experts of a layer, all of which may move; None: none may
