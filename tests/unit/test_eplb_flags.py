"""`--enable-eplb` and `--eplb-config`: what they give, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import EplbConfig
from fastdeploy.errors import ConfigError
from tests.tiny_models import build

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("eplb") / "model", "ernie4_5_moe")


def eplb_of(model: Path, settings: dict[str, Any] | None = None, **flags: Any) -> EplbConfig | None:
    common = {"data_parallel_size": 4, "enable_expert_parallel": True, "enable_eplb": True, "device": "cpu"}
    return resolve(EngineArgs(model=str(model), **(common | flags), eplb_config=settings), {}).eplb


def test_settings(model: Path) -> None:
    assert eplb_of(model) == EplbConfig(redundant=0, interval_s=60.0, min_gain=0.05)
    settings = {"redundant_experts_num": 3, "rearrange_interval_s": 0, "min_gain": 0.2}
    assert eplb_of(model, settings) == EplbConfig(redundant=3, interval_s=0.0, min_gain=0.2)
    assert eplb_of(model, {"redundant_experts_num": 24}) == EplbConfig(redundant=24)


def test_off(model: Path) -> None:
    assert eplb_of(model, enable_eplb=False) is None
    assert eplb_of(model, data_parallel_size=1) is None  # the command may be tried on one rank


def test_the_original_setting_without_effect(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert eplb_of(model, {"redundant_expert_async_load_model_shmem_size_gb": 10}) == EplbConfig()
    assert "redundant_expert_async_load_model_shmem_size_gb has no effect" in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"redundant": 1}, "'redundant' is none of redundant_experts_num, rearrange_interval_s, min_gain"),
        ({"redundant_experts_num": -1}, "redundant_experts_num = -1: must be a whole number, at least 0"),
        ({"redundant_experts_num": 1.5}, "redundant_experts_num = 1.5: must be a whole number"),
        ({"redundant_experts_num": True}, "redundant_experts_num = True: must be a whole number"),
        ({"redundant_experts_num": 25}, "must be at most 24: with so many each of 4 ranks holds all 8 experts"),
        ({"rearrange_interval_s": -1}, "rearrange_interval_s = -1: must be a number, at least 0"),
        ({"min_gain": "0"}, "min_gain = '0': must be a number, at least 0"),
    ],
)
def test_nonsense_is_refused(model: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        eplb_of(model, settings)
    assert f"--eplb-config: {named}" in str(raised.value).replace(f"redundant_experts_num = 25: {named}", named)
