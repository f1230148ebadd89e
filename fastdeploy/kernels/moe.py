"""The experts of a sparse layer as a few kernels, with nothing that waits for the device.

Two ways, chosen by the number of rows: few rows (decode) read each touched expert's weights once at memory speed, many
rows (prefill) run sorted tiles at tensor-core speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastdeploy.kernels.int_matmul import down_int, gate_up_int
from fastdeploy.kernels.moe_few import Groups, down_few, gate_up_few
from fastdeploy.kernels.moe_few_fp8 import down_few_fp8, gate_up_few_fp8
from fastdeploy.kernels.moe_many import down_many, gate_up_many
from fastdeploy.kernels.moe_many_fp8 import down_many_fp8, gate_up_many_fp8
from fastdeploy.kernels.moe_rows import SlotOutputs, gather_rows, sort_pairs
from fastdeploy.kernels.moe_tiles import FewPlan, ManyPlan, MoETiles
from fastdeploy.kernels.quantize import RowsFp8, quantize_rows
from fastdeploy.kernels.silu_mul import silu_mul
from fastdeploy.kernels.weight_formats import dequantize


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Stacked weights of routed and shared experts: [e, 2M, H] with gate rows first, and [e, H, M].

    The last `n_shared` experts are passed by every token with weight 1. Quantised weights are codes and bring scales,
    see weight_formats.py; the codes' dtype tells the format.
    """

    gate_up_eXH: Tensor
    down_eHM: Tensor
    n_shared: int = 0
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def n_local(self) -> int:
        """Routed experts."""
        return self.gate_up_eXH.shape[0] - self.n_shared

    def n_bytes(self) -> int:
        """Bytes of weights and scales."""
        tensors = (self.gate_up_eXH, self.down_eHM, self.gate_up_scale, self.down_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def fused_moe_ref(x_tH: Tensor, weights: ExpertWeights, expert_tk: Tensor, weight_tk: Tensor) -> Tensor:
    """What `fused_moe` computes, expert after expert, in float32."""
    gate_up_eXH, down_eHM = weights.gate_up_eXH, weights.down_eHM
    y_tH = torch.zeros_like(x_tH, dtype=torch.float32)
    for i in range(gate_up_eXH.shape[0]):
        if weights.gate_up_scale is not None and weights.down_scale is not None:
            gate_up_XH = dequantize(gate_up_eXH[i], weights.gate_up_scale[i], x_tH.shape[1])
            down_HM = dequantize(down_eHM[i], weights.down_scale[i], gate_up_eXH.shape[1] // 2)
        else:
            gate_up_XH, down_HM = gate_up_eXH[i].float(), down_eHM[i].float()
        gate_tM, up_tM = functional.linear(x_tH.float(), gate_up_XH).chunk(2, -1)
        weight_t = (weight_tk.float() * (expert_tk == i)).sum(1) if i < weights.n_local else weight_tk.new_ones(1)
        y_tH += functional.linear(functional.silu(gate_tM) * up_tM, down_HM) * weight_t[:, None]
    return y_tH.to(x_tH.dtype)


def fused_moe(x_tH: Tensor, weights: ExpertWeights, expert_tk: Tensor, weight_tk: Tensor, tiles: MoETiles) -> Tensor:
    """Sum over a token's experts of weight times FFN, [t, H].

    `expert_tk` int32 or int64 [t, k] holds ids of routed experts; n_local stands for an expert that is not here and
    costs nothing. `weight_tk` [t, k] any float dtype.
    """
    return moe_slots(x_tH, weights, expert_tk, weight_tk, tiles).summed()


def moe_slots(
    x_tH: Tensor,
    weights: ExpertWeights,
    expert_tk: Tensor,
    weight_tk: Tensor,
    tiles: MoETiles,
    rows8: RowsFp8 | None = None,
) -> SlotOutputs:
    """`fused_moe` but for the last addition. `rows8`: what `quantize_rows` makes of x, if it is known already."""
    expert_tk = expert_tk.contiguous()
    plan = tiles.plan(x_tH.shape[0])
    if plan.few is not None:
        y_pH = _few(x_tH, weights, expert_tk, plan.few, rows8)
        return SlotOutputs(y_pH, expert_tk, weight_tk, weights.n_local, weights.n_shared)
    assert plan.many is not None, "a plan holds one of the two ways"
    if weights.gate_up_scale is not None and weights.down_scale is not None:
        rows8 = rows8 or quantize_rows(x_tH)
        y_pH = _many_fp8(rows8, weights, weights.gate_up_scale, weights.down_scale, expert_tk, tiles.n_sms)
        return SlotOutputs(y_pH, expert_tk, weight_tk, weights.n_local, weights.n_shared)
    # A dense matmul is faster than a grouped one, so what all rows pass goes another way here.
    y_pH = _many(x_tH, weights, expert_tk, plan.many, tiles.n_sms)
    base_tH = _shared_ffn(x_tH, weights) if weights.n_shared else None
    return SlotOutputs(y_pH, expert_tk, weight_tk, weights.n_local, 0, base_tH)


def _few(x_tH: Tensor, weights: ExpertWeights, expert_tk: Tensor, plan: FewPlan, rows8: RowsFp8 | None) -> Tensor:
    n_local, n_shared = weights.n_local, weights.n_shared
    pair_p, offset_g = (None, None) if plan.direct else sort_pairs(expert_tk, n_local, n_shared)
    groups = Groups(expert_tk, n_local, n_shared, pair_p, offset_g)
    if weights.gate_up_scale is None or weights.down_scale is None:
        return down_few(
            gate_up_few(x_tH, weights.gate_up_eXH, groups, plan.gate_up), weights.down_eHM, groups, plan.down
        )
    if weights.gate_up_eXH.dtype != torch.float8_e4m3fn:
        h_pM = gate_up_int(x_tH, weights.gate_up_eXH, weights.gate_up_scale, groups, plan.gate_up)
        return down_int(h_pM, weights.down_eHM, weights.down_scale, groups, plan.down)
    rows8 = rows8 or quantize_rows(x_tH)
    h8 = gate_up_few_fp8(*rows8, weights.gate_up_eXH, weights.gate_up_scale, groups, plan.gate_up)
    return down_few_fp8(*h8, weights.down_eHM, weights.down_scale, groups, plan.down, like=x_tH)


def _many(x_tH: Tensor, weights: ExpertWeights, expert_tk: Tensor, plan: ManyPlan, n_sms: int) -> Tensor:
    """Routed slots only."""
    assert plan.gate_up is not None and plan.down is not None, "tiles of FP8 weights for others"
    n_local = weights.n_local
    pair_p, offset_g = sort_pairs(expert_tk, n_local)
    x_pH = gather_rows(x_tH, pair_p, offset_g, expert_tk.shape[1])
    h_pM = gate_up_many(x_pH, weights.gate_up_eXH[:n_local], offset_g, plan.gate_up, n_sms)
    return down_many(h_pM, weights.down_eHM[:n_local], pair_p, offset_g, plan.down, n_sms)


def _shared_ffn(x_tH: Tensor, weights: ExpertWeights) -> Tensor:
    """The sum of the experts that every token passes, as dense matmuls; [t, H]."""
    gate_up_sXH, down_sHM = weights.gate_up_eXH[weights.n_local :], weights.down_eHM[weights.n_local :]
    n_shared, width = gate_up_sXH.shape[0], gate_up_sXH.shape[1] // 2
    both_X = functional.linear(x_tH, gate_up_sXH.flatten(0, 1)).view(-1, 2 * width)
    h_tsM = silu_mul(both_X).view(-1, n_shared, width)
    y_tH = functional.linear(h_tsM[:, 0], down_sHM[0])
    for i in range(1, n_shared):
        y_tH.addmm_(h_tsM[:, i], down_sHM[i].T)
    return y_tH


def _many_fp8(
    rows8: RowsFp8, weights: ExpertWeights, gate_up_scale: Tensor, down_scale: Tensor, expert_tk: Tensor, n_sms: int
) -> Tensor:
    """All slots."""
    n_slots = expert_tk.shape[1] + weights.n_shared
    pair_p, offset_g = sort_pairs(expert_tk, weights.n_local, weights.n_shared)
    x8_pH = gather_rows(rows8.codes_tI, pair_p, offset_g, n_slots)
    h8 = gate_up_many_fp8(x8_pH, rows8.scale_bt, weights.gate_up_eXH, gate_up_scale, pair_p, offset_g, n_slots, n_sms)
    return down_many_fp8(*h8, weights.down_eHM, down_scale, pair_p, offset_g, n_sms)
