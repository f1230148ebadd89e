"""Random weights made share by share are those of the whole model."""

from __future__ import annotations

import pytest
import torch

from fastdeploy.models.random_weights import RandomWeights

NAME = "model.layers.0.self_attn.q_proj.weight"


def _read(name: str = NAME, seed: int = 0, shape: tuple[int, ...] = (300, 200)) -> torch.Tensor:
    return RandomWeights(2, seed).require(name, shape).read()


@pytest.mark.parametrize(("rows", "columns"), [((7, 9), (0, 200)), ((0, 300), (11, 199)), ((250, 300), (3, 4))])
def test_a_share_is_a_part_of_the_whole(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    share = RandomWeights(2, 0).require(NAME, (300, 200)).read(slice(*rows), slice(*columns))
    assert torch.equal(share, _read()[slice(*rows), slice(*columns)])


def test_a_share_may_be_empty() -> None:
    assert RandomWeights(2, 0).require(NAME, (300, 200)).read(slice(5, 5)).shape == (0, 200)


def test_numbers_look_normal_and_independent() -> None:
    x = _read(shape=(2000, 1000)) / 0.02
    assert abs(x.mean()) < 4 / x.numel() ** 0.5
    assert abs(x.std() - 1) < 0.01
    # The largest singular value of independent numbers is sqrt(rows) + sqrt(columns).
    assert torch.linalg.svdvals(x)[0] / (2000**0.5 + 1000**0.5) == pytest.approx(1, abs=0.02)


def test_seed_and_name_decide() -> None:
    assert torch.equal(_read(), _read())
    for other in (_read(seed=1), _read(name="model.layers.1.self_attn.q_proj.weight")):
        assert abs((other * _read()).mean() / 0.02**2) < 5 / other.numel() ** 0.5


def test_projections_back_are_smaller_norms_one_biases_zero() -> None:
    assert _read(name="model.layers.0.mlp.down_proj.weight").std() == pytest.approx(0.02 / 2, rel=0.02)
    assert _read(name="model.norm.weight", shape=(8,)).tolist() == [1.0] * 8
    assert _read(name="model.layers.0.self_attn.q_proj.bias", shape=(8,)).tolist() == [0.0] * 8


def test_dtype_is_that_of_the_checkpoint() -> None:
    half = RandomWeights(2, 0, torch.bfloat16).require(NAME, (300, 200)).read()
    assert torch.equal(half, _read().bfloat16())
