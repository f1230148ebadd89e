"""What a tensor rank reads is its share of the checkpoint: all shares together are the whole, and no more is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdeploy.distributed.sharding import Cut, CutWeights, FFNShare

pytestmark = pytest.mark.timeout(60)


class Stored:
    """A tensor that notes how many elements were read."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.n_read = 0

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        part = self.whole[rows or slice(None)]
        part = part if columns is None else part[:, columns]
        self.n_read += part.numel()
        return part


class Checkpoint:
    """Tensors by name, checked for their shape as a real one is."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.tensors = {name.replace("__", "."): Stored(torch.randn(shape)) for name, shape in shapes.items()}

    def require(self, name: str, shape: tuple[int, ...]) -> Stored:
        assert self.tensors[name].whole.shape == shape
        return self.tensors[name]


@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_ffn_shares_make_the_whole(n_parts: int) -> None:
    source = Checkpoint(
        mlp__gate_proj__weight=(12, 5),
        mlp__gate_proj__bias=(12,),
        mlp__down_proj__weight=(5, 12),
        mlp__down_proj__bias=(5,),
        mlp__gate__weight=(12, 5),
    )
    width = 12 // n_parts
    shares = [FFNShare(source, n_parts, part) for part in range(n_parts)]
    for name, axis, shape in (
        ("mlp.gate_proj.weight", 0, (width, 5)),
        ("mlp.gate_proj.bias", 0, (width,)),
        ("mlp.down_proj.weight", 1, (5, width)),
    ):
        stored = source.tensors[name]
        assert torch.equal(torch.cat([share.require(name, shape).read() for share in shares], axis), stored.whole)
        assert stored.n_read == stored.whole.numel()
    for name in ("mlp.down_proj.bias", "mlp.gate.weight"):  # the row-parallel bias and the router are nobody's share
        whole = source.tensors[name].whole
        assert torch.equal(shares[-1].require(name, tuple(whole.shape)).read(), whole)


def test_part_of_a_share() -> None:
    """A reader may take some rows or columns of what it sees as a whole tensor."""
    source = Checkpoint(mlp__up_proj__weight=(12, 8), mlp__down_proj__weight=(8, 12))
    share = FFNShare(source, 3, 1)
    up, down = share.require("mlp.up_proj.weight", (4, 8)), share.require("mlp.down_proj.weight", (8, 4))
    assert torch.equal(up.read(slice(1, 3)), source.tensors["mlp.up_proj.weight"].whole[5:7])
    assert torch.equal(up.read(slice(2, None), slice(0, 2)), source.tensors["mlp.up_proj.weight"].whole[6:8, :2])
    assert torch.equal(down.read(None, slice(1, 4)), source.tensors["mlp.down_proj.weight"].whole[:, 5:8])
    assert torch.equal(down.read(slice(3, 4)), source.tensors["mlp.down_proj.weight"].whole[3:4, 4:8])


def test_uneven_cut() -> None:
    source = Checkpoint(lm_head__weight=(7, 3))
    mine = CutWeights(source, {"lm_head": Cut(0, 4, 7)})
    assert torch.equal(mine.require("lm_head.weight", (3, 3)).read(), source.tensors["lm_head.weight"].whole[4:])
