"""How many KV pages a rank takes."""

import logging
from dataclasses import replace

import pytest
from tiny_models import build

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import ConfigError
from fastdeploy.runner.kv_memory import choose_n_pages

pytestmark = pytest.mark.timeout(60)

PAGE_BYTES = 1000


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = build(tmp_path_factory.mktemp("model"), "ernie4_5_moe")
    return resolve(EngineArgs(model=str(folder), device="cpu", max_model_len=128, max_num_seqs=4, block_size=16))


def asked(config: EngineConfig, n_pages: int) -> EngineConfig:
    return replace(config, cache=replace(config.cache, n_pages=n_pages))


def test_a_number_asked_for_is_taken(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastdeploy.rank"):
        assert choose_n_pages(asked(config, 50), PAGE_BYTES, 50_000, 60_000, 400_000) == 50
    assert not caplog.records


def test_more_than_is_free_is_told(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastdeploy.rank"):
        assert choose_n_pages(asked(config, 400), PAGE_BYTES, 50_000, 60_000, 400_000) == 400
    assert "--num-gpu-blocks-override 400" in caplog.text and "50,000" in caplog.text


def test_more_than_there_is_is_refused(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"--num-gpu-blocks-override 401: .* 400,000; at most 400 fit"):
        choose_n_pages(asked(config, 401), PAGE_BYTES, 50_000, 60_000, 400_000)


def test_a_cpu_takes_what_slots_need(config: EngineConfig) -> None:
    assert choose_n_pages(config, PAGE_BYTES, 10**9, 10**9, 10**9) == 4 * 128 // 16


def test_no_room_is_refused(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        choose_n_pages(config, PAGE_BYTES, 0, 60_000, 400_000)
