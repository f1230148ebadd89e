"""Rows written to the memory of other ranks and summed up again, all ranks in one process, one after the other."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, DTYPES, needs_triton, poison

pytestmark = [needs_triton, pytest.mark.timeout(300)]

N_EXPERTS, K, HIDDEN = 11, 3, 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows_g", [(4, 4), (1, 0), (0, 3), (7, 2, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("every_row", [True, False])
def test_dispatch_and_combine(n_rows_g: tuple[int, ...], dtype: torch.dtype, every_row: bool) -> None:
    from fastdeploy.distributed.all_to_all.symm_mem import local_ids
    from fastdeploy.kernels import peer_exchange as px
    from fastdeploy.kernels.moe_rows import SlotOutputs, sum_slots_ref

    size, n_rows = len(n_rows_g), sum(n_rows_g)
    layout = px.PeerLayout(size, n_rows + 3, N_EXPERTS, K, HIDDEN, dtype.itemsize)
    memory_g = [torch.full((layout.n_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
    for memory in memory_g:
        memory[: layout.span_at].zero_()
    address_g = torch.tensor([memory.data_ptr() for memory in memory_g], device=DEVICE)
    table_ge = local_ids(N_EXPERTS, size).to(DEVICE)
    view_g = [
        px.PeerView(layout, g, address_g, table_ge, torch.zeros(2, px.MAX_PROGRAMS, dtype=torch.int32, device=DEVICE))
        for g in range(size)
    ]
    generator = torch.Generator().manual_seed(n_rows)
    for _ in range(3):  # flags count on
        x_gtH = [torch.randn(n, HIDDEN, generator=generator).to(DEVICE, dtype) for n in n_rows_g]
        expert_gtk = [torch.rand(n, N_EXPERTS, generator=generator).topk(K).indices.to(DEVICE) for n in n_rows_g]
        weight_gtk = [torch.rand(n, K, generator=generator).to(DEVICE) for n in n_rows_g]
        for part in (px.SEND, px.RECEIVE):
            for view, *mine in zip(view_g, x_gtH, expert_gtk, weight_gtk, strict=True):
                px.dispatch_rows(view, *mine, n_rows_g, every_row=every_row, part=part)
        y_g, sums_g = [], []
        for g, memory in enumerate(memory_g):

            def found(at: int, n: int, kind: torch.dtype, memory: torch.Tensor = memory) -> torch.Tensor:
                return memory[at : at + n_rows * n * kind.itemsize].view(kind).view(n_rows, n)

            expert_rk, weight_rk = found(layout.expert_at, K, torch.int32), found(layout.weight_at, K, torch.float32)
            x_rH = found(layout.x_at, HIDDEN, dtype)
            expected = px.dispatch_ref(x_gtH, expert_gtk, weight_gtk, table_ge[g])
            n_local = int(table_ge[g, -1])
            wanted_r = (expected[1] < n_local).any(1) | every_row
            assert torch.equal(x_rH[wanted_r], expected[0][wanted_r])
            assert torch.equal(expert_rk, expected[1])
            assert torch.equal(weight_rk, expected[2])
            y_pH = torch.randn(n_rows * (K + 1), HIDDEN, generator=generator).to(DEVICE, dtype)
            routed_rk1 = torch.cat((expected[1] < n_local, torch.ones_like(expected[1][:, :1], dtype=torch.bool)), 1)
            y_pH[~routed_rk1.flatten()] = float("nan")  # nobody computes what is not here
            base_rH = torch.randn(n_rows, HIDDEN, generator=generator).to(DEVICE, dtype) if g else None
            y_g.append(SlotOutputs(y_pH, expert_rk, weight_rk, n_local, 1, base_rH))
            sums_g.append(sum_slots_ref(y_pH, expert_rk, weight_rk, n_local, 1, base_rH))
        outputs = []
        for part in (px.SEND, px.RECEIVE):
            outputs = [px.combine_rows(v, y, n_rows_g, part=part) for v, y in zip(view_g, y_g, strict=True)]
        for g, out_tH in enumerate(outputs):
            expected_tH = px.combine_ref(sums_g, sum(n_rows_g[:g]), n_rows_g[g])
            tolerance = 1e-5 if dtype is torch.float32 else 3e-2
            assert torch.allclose(out_tH, expected_tH, rtol=tolerance, atol=tolerance)
        for memory in memory_g:
            poison(memory[layout.back_at :].view(dtype))
