"""What one forward pass is given besides token ids: StepContext."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdeploy.wire.messages import StepAgreement


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step as the model sees it; every layer gets the same value.

    rotation_td: complex64 [t, D/2], the rotary turn of each token's position.
    pages_l:     the KV pages, one tensor per layer in the layout of the attention backend.
    attention:   what the backend's `prepare` worked out for this batch, used by all layers.
    agreement:   with expert parallelism, what all ranks of the group know of this step; t may be 0 then.
    """

    rotation_td: Tensor
    pages_l: list[Tensor]
    attention: Any
    agreement: StepAgreement | None = None
