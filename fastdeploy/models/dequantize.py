"""Block-wise FP8 weights: which checkpoints hold them, and their values. Every other stored quantisation is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdeploy.errors import ConfigError
from fastdeploy.models.layouts import Layout

DEFAULT_BLOCK = (128, 128)
SUPPORTED = "supported is block-wise FP8 (or unquantised weights); use such a release of the model"


def read_block_size(config: Mapping[str, Any], layout: Layout, stored_names: Iterable[str]) -> tuple[int, int]:
    """Rows and columns of the blocks that share one scale, for canonical [out, in] weights.

    The default is given for unquantised checkpoints. Raises ConfigError naming the scheme when `config` (the content
    of config.json) says that the weights are stored in one that cannot be read.
    """
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return DEFAULT_BLOCK
    if not isinstance(quantisation, dict):
        raise ConfigError(f"config.json: quantization_config = {quantisation!r}: must be an object")
    if layout is Layout.HF and "quant_method" in quantisation:
        _check_hf_scheme(quantisation)
    else:
        _check_paddle_scheme(config, quantisation, any(name.endswith(".quant_weight") for name in stored_names))
    match quantisation.get("weight_block_size", DEFAULT_BLOCK):
        case (int(rows), int(columns)) if rows > 0 and columns > 0 and (rows == columns or layout is Layout.HF):
            return rows, columns
        case other:
            raise ConfigError(
                f"config.json: quantization_config.weight_block_size = {other!r}: must be two whole numbers of 1 or "
                f"more, equal ones in the Paddle layout"
            )


def _check_hf_scheme(quantisation: Mapping[str, Any]) -> None:
    method = quantisation["quant_method"]
    if method != "fp8":
        raise ConfigError(f"config.json: quantization_config.quant_method = {method!r}: {SUPPORTED}")
    if quantisation.get("weight_block_size") is None:
        raise ConfigError(f"config.json: quantization_config: fp8 without weight_block_size (one scale): {SUPPORTED}")


def _check_paddle_scheme(config: Mapping[str, Any], quantisation: Mapping[str, Any], has_codes: bool) -> None:
    """A scheme named for weights stored as plain numbers is one to be applied at load time: it is no obstacle."""
    is_quantised = quantisation.get("is_quantized", config.get("is_quantized"))
    if is_quantised is False and not has_codes:
        return
    scheme = quantisation.get("quantization", quantisation.get("quant_method"))
    named = {"quantization": scheme}
    if scheme == "mix_quant":
        named = {key: quantisation.get(key) for key in ("dense_quant_type", "moe_quant_type")}
        named = {key: value for key, value in named.items() if value is not None}
    for key, value in named.items():
        if value != "block_wise_fp8":
            raise ConfigError(f"config.json: quantization_config.{key} = {value!r}: {SUPPORTED}")


def dequantise_blocks(
    codes_rc: Tensor, scales: Tensor, first_row: int, first_column: int, block: tuple[int, int]
) -> Tensor:
    """The float32 values of a rectangle of block-wise FP8 codes; returns [r, c].

    `codes_rc` float8_e4m3fn [r, c] is the rectangle whose first element lies at (`first_row`, `first_column`) of the
    whole weight [R, C]; `scales` [ceil(R / block[0]), ceil(C / block[1])], any float dtype, is the table of the whole.
    """
    n_rows, n_columns = codes_rc.shape
    values_rc = codes_rc.to(torch.float32)
    block_of_column = torch.arange(first_column, first_column + n_columns) // block[1]
    row = 0
    while row < n_rows:  # one row of blocks at a time, so that no table as large as the weight is made
        block_row = (first_row + row) // block[0]
        stop = min(n_rows, (block_row + 1) * block[0] - first_row)
        values_rc[row:stop] *= scales[block_row].to(torch.float32)[block_of_column]
        row = stop
    return values_rc
