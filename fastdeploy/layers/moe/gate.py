"""The router of a sparse layer: which experts a token goes to, and with what weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdeploy.config.schema import MoEShape
from fastdeploy.kernels.cpu.gate import PanelGate
from fastdeploy.kernels.cpu.library import kernels_for
from fastdeploy.layers.placement import Placement
from fastdeploy.models.weights import WeightSource


@dataclass(frozen=True, slots=True)
class Routing:
    """expert_tk: int64 [t, k] expert ids; weight_tk: [t, k] in the activations' dtype, on a GPU float32."""

    expert_tk: Tensor
    weight_tk: Tensor


class Gate(nn.Module):
    """Softmax over all experts, top k of probability plus correction bias, weights without the bias.

    The bias only steers the selection (auxiliary-loss-free balancing, Wang et al., 2024).
    """

    def __init__(self, hidden_size: int, moe: MoEShape, place: Placement) -> None:
        super().__init__()
        self.moe = moe
        gate_dtype = torch.float32 if moe.gate_in_float32 else place.dtype
        self.weight_eH = torch.empty(moe.n_experts, hidden_size, dtype=gate_dtype, device=place.device)
        self.dtype = place.dtype
        self.kernels = kernels_for(place.device, place.dtype)
        self.panel_gate: PanelGate | None = None
        self.split_neH: Tensor | None = None
        self.arrived_b: Tensor | None = None
        self.bias_e = torch.empty(moe.n_experts, device=place.device) if moe.has_correction_bias else None

    def forward(self, x_tH: Tensor) -> Routing:
        if self.panel_gate is not None:
            return Routing(*self.panel_gate(x_tH))
        if self.split_neH is not None and self.arrived_b is not None:
            # Triton is there on GPUs only.
            from fastdeploy.kernels.gate import choose_experts

            k, norm_min = self.moe.n_experts_per_token, self.moe.norm_min if self.moe.renormalise else None
            return Routing(*choose_experts(x_tH, self.split_neH, self.bias_e, k, norm_min, self.arrived_b))
        score_te = functional.linear(x_tH.to(self.weight_eH.dtype), self.weight_eH).softmax(-1, dtype=torch.float32)
        if self.bias_e is None:
            weight_tk, expert_tk = score_te.topk(self.moe.n_experts_per_token, dim=-1)
        else:
            expert_tk = (score_te + self.bias_e).topk(self.moe.n_experts_per_token, dim=-1).indices
            weight_tk = score_te.gather(-1, expert_tk)
        if self.moe.renormalise:
            weight_tk = weight_tk / weight_tk.sum(-1, keepdim=True).clamp_min(self.moe.norm_min)
        return Routing(expert_tk, weight_tk.to(x_tH.dtype))

    def load(self, weights: WeightSource, name: str) -> None:
        """Fill from `NAME.weight` [e, H] and, where the family has one, `NAME.e_score_correction_bias` [e]."""
        self.weight_eH.copy_(weights.require(f"{name}.weight", tuple(self.weight_eH.shape)).read())
        if self.bias_e is not None:
            shape = (self.moe.n_experts,)
            self.bias_e.copy_(weights.require(f"{name}.e_score_correction_bias", shape).read())
        if self.kernels is not None:
            norm_min = self.moe.norm_min if self.moe.renormalise else None
            k = self.moe.n_experts_per_token
            self.panel_gate = PanelGate(self.kernels, self.weight_eH, self.bias_e, k, norm_min)
        if self.weight_eH.is_cuda:
            from fastdeploy.kernels.gate import N_ARRIVED, split_gate_weight

            self.split_neH = split_gate_weight(self.weight_eH, self.dtype)
            self.arrived_b = torch.zeros(N_ARRIVED, dtype=torch.int32, device=self.weight_eH.device)
