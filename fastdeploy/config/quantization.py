"""`--quantization`: what can be made of a checkpoint's weights while they are loaded, and what it takes."""

from __future__ import annotations

from typing import Any, get_args

from fastdeploy.config.schema import DeviceName, ModelShape, Quantization

# As in kernels/weight_formats.py, which imports torch.
_BLOCK = 128  # of FP8, and the columns of a wint4 group
_SCALE_BYTES, _INT4_SCALE_BYTES = 4, 2
_FP8_HIDDEN_STEP, _FP8_WIDTH_STEP = 256, 128  # sizes that the FP8 experts' kernels take


def resolve_quantization(
    asked: str | dict[str, Any] | None, device: DeviceName, shape: ModelShape, problems: list[str]
) -> Quantization | None:
    """The format asked for, or None; what is wrong with it is added to `problems`."""
    if asked is None:
        return None
    for name in get_args(Quantization):
        if asked == name:
            if name == "block_wise_fp8":
                problems += _fp8_problems(device, shape)
            return name  # type: ignore[no-any-return]
    shown = f"--quantization {asked}" if isinstance(asked, str) else "--quantization"
    problems.append(f"{shown}: must be one of {', '.join(get_args(Quantization))}")
    return None


def _fp8_problems(device: DeviceName, shape: ModelShape) -> list[str]:
    flag = "--quantization block_wise_fp8"
    if device != "cuda":
        return [f"{flag}: needs a Hopper GPU; on a CPU there are wint8 and wint4"]
    moe = shape.moe
    if moe is not None and (shape.hidden_size % _FP8_HIDDEN_STEP or moe.expert_width % _FP8_WIDTH_STEP):
        return [
            f"{flag}: experts of width {moe.expert_width} and hidden size {shape.hidden_size} do not fit its kernels, "
            f"which take widths in {_FP8_WIDTH_STEP}s and hidden sizes in {_FP8_HIDDEN_STEP}s; wint8 and wint4 take any"
        ]
    return []


def matrix_bytes(quantization: Quantization | None, n_out: int, n_in: int, item: int) -> int:
    """Bytes of a weight [n_out, n_in] in this format; unquantised, `item` for each element."""
    match quantization:
        case "block_wise_fp8":
            return n_out * n_in + -(-n_out // _BLOCK) * -(-n_in // _BLOCK) * _SCALE_BYTES
        case "wint8":
            return n_out * (n_in + _SCALE_BYTES)
        case "wint4":
            return n_out * -(-n_in // _BLOCK) * (_BLOCK // 2 + _INT4_SCALE_BYTES)
        case None:
            return n_out * n_in * item
