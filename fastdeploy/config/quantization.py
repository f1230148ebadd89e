"""`--quantization`: what can be made of a checkpoint's weights while they are loaded."""

from __future__ import annotations

from typing import Any, Literal

from fastdeploy.config.schema import DeviceName, ModelShape

BLOCK_WISE_FP8: Literal["block_wise_fp8"] = "block_wise_fp8"


def resolve_quantization(
    asked: str | dict[str, Any] | None, device: DeviceName, shape: ModelShape, problems: list[str]
) -> Literal["block_wise_fp8"] | None:
    """The kind asked for, or None; what is wrong with it is added to `problems`."""
    if asked is None:
        return None
    if asked != BLOCK_WISE_FP8:
        shown = f"--quantization {asked}" if isinstance(asked, str) else "--quantization"
        problems.append(f"{shown}: not supported yet: {BLOCK_WISE_FP8} is, on Hopper GPUs")
    elif device != "cuda":
        problems.append(f"--quantization {asked}: needs a Hopper GPU; leave it out to compute in float32 on a CPU")
    return BLOCK_WISE_FP8
