"""The slots of experts by the kernel and by its reference."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, needs_triton

pytestmark = [needs_triton, pytest.mark.timeout(300)]

# Expert 0 in one slot, 1 in three, 2 in two, 3 in two.
TABLE = [[1, 4, 0, 0], [3, 0, 5, 7], [2, 1, 6, 0], [2, 2, 3, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("n_rows", "offset"), [(0, 0), (1, 0), (1, 5), (7, 1), (300, 2)])
def test_same_slots_and_counts(n_rows: int, offset: int, dtype: torch.dtype) -> None:
    from fastdeploy.kernels.expert_slots import slots_of
    from fastdeploy.kernels.expert_slots_ref import slots_of_ref

    generator = torch.Generator().manual_seed(n_rows)
    table_eX = torch.tensor(TABLE, dtype=torch.int32, device=DEVICE)
    expert_tk = torch.rand(n_rows, 4, generator=generator).topk(3).indices.to(DEVICE, dtype)
    counts = [torch.full((4,), 2**33, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    expected_tk = slots_of_ref(expert_tk, table_eX, counts[0], offset)
    found_tk = slots_of(expert_tk, table_eX, counts[1], offset)
    assert found_tk.dtype == dtype
    assert torch.equal(found_tk, expected_tk)
    assert torch.equal(*counts)
    assert (counts[0] - 2**33).tolist() == torch.bincount(expert_tk.flatten().cpu().long(), minlength=4).tolist()


def test_rows_take_turns() -> None:
    from fastdeploy.kernels.expert_slots import slots_of

    table_eX = torch.tensor(TABLE, dtype=torch.int32, device=DEVICE)
    rows_e = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    expert_tk = torch.tensor([[1, 0]] * 4, device=DEVICE)
    assert slots_of(expert_tk, table_eX, rows_e, 2).tolist() == [[7, 4], [0, 4], [5, 4], [7, 4]]
    assert rows_e.tolist() == [4, 4, 0, 0]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs need a GPU")
def test_a_graph_sees_a_new_table() -> None:
    from fastdeploy.kernels.expert_slots import slots_of

    table_eX = torch.tensor(TABLE, dtype=torch.int32, device=DEVICE)
    rows_e = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    expert_tk = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    slots_of(expert_tk, table_eX, rows_e, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slot_tk = slots_of(expert_tk, table_eX, rows_e, 0)
    graph.replay()
    assert slot_tk.tolist() == [[4, 0], [6, 3]]
    table_eX.copy_(torch.tensor([[1, 2, 0, 0], [1, 3, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.int32))
    graph.replay()
    assert slot_tk.tolist() == [[2, 3], [0, 1]]
    assert rows_e.tolist() == [3, 3, 3, 3]
