"""Flags + config.json + hardware + environment -> EngineConfig."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.config import resolve as resolve_module
from fastdeploy.config.admission import resolve_admission
from fastdeploy.config.args import EngineArgs, ServerArgs
from fastdeploy.config.hardware import CudaDevice, cuda_devices, memory_bytes, n_usable_cpus
from fastdeploy.config.parallel import served_devices
from fastdeploy.config.resolve import resolve, resolve_all, resolve_server
from fastdeploy.config.schema import EngineConfig, ParallelConfig
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "eos_token_id": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "cuda_devices", tuple)


def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "cuda_devices", lambda: (CudaDevice("GPU", 1, (9, 0)),))


def resolved(environ: dict[str, str] | None = None, **kwargs: Any) -> EngineConfig:
    return resolve(EngineArgs.from_kwargs(**kwargs), environ or {})


def problems(environ: dict[str, str] | None = None, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(environ, **kwargs)
    return str(caught.value).splitlines()


def test_defaults_on_a_cpu(model: str) -> None:
    config = resolved(model=model)
    assert (config.model.device, config.model.dtype, config.model.max_model_len) == ("cpu", "float32", 2048)
    assert (config.model.path, config.model.served_name, config.model.eos_token_ids) == (model, model, (2,))
    assert (config.cache.page_tokens, config.cache.n_pages, config.cache.memory_fraction) == (64, None, 0.9)
    assert (config.scheduler.max_seqs, config.scheduler.max_batched_tokens) == (8, 2048)
    assert config.scheduler.chunked_prefill
    assert config.scheduler.long_prefill_tokens == 81  # 4% of 2048
    assert (config.scheduler.max_waiting, config.scheduler.waiting_ttl_s) == (-1, 900.0)
    assert (config.logprobs.max_logprobs, config.logprobs.mode) == (20, "raw_logprobs")
    assert (config.n_threads, config.log_dir) == (None, str(Path("log").absolute()))


def test_defaults_on_a_gpu(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    config = resolved(model=model)
    assert (config.model.device, config.model.dtype) == ("cuda", "float16")
    assert config.scheduler.max_batched_tokens == 8192
    assert resolved(model=model, device="cpu").model.dtype == "float32"


def test_group_sizes_that_contradict_the_model_are_all_told(model: str) -> None:
    lines = problems(model=model, tensor_parallel_size=3, data_parallel_size=2, enable_expert_parallel=True)
    assert any("--tensor-parallel-size 3" in line and "attention heads, 4" in line for line in lines)
    assert any("--enable-expert-parallel" in line and "no experts" in line for line in lines)


def test_ranks_that_a_server_serves(model: str) -> None:
    whole = resolved(model=model, data_parallel_size=4).parallel
    assert (whole.serves, whole.data_rank, whole.n_ranks, whole.group_size) == ((0, 1, 2, 3), 0, 4, 1)
    one = resolved(
        {"FD_ENABLE_MULTI_API_SERVER": "1"}, model=model, data_parallel_size=4, local_data_parallel_id=2
    ).parallel
    assert (one.serves, one.data_rank) == ((2,), 2)
    machines = {"data_parallel_size": 4, "ips": "10.9.9.1,10.9.9.2", "model": model}
    second = resolved({"FD_HOST_IP": "10.9.9.2"}, **machines).parallel
    assert (second.serves, second.host, second.n_local_replicas) == ((2, 3), "10.9.9.2", 2)
    assert "FD_HOST_IP" in problems(**machines)[0]
    assert "10.9.9.3" in problems({"FD_HOST_IP": "10.9.9.3"}, **machines)[0]
    wrong = {**machines, "local_data_parallel_id": 1}
    assert "2..3" in problems({"FD_HOST_IP": "10.9.9.2"}, **wrong)[0]


def test_ranks_of_one_machine_share_its_cores(model: str) -> None:
    assert resolved(model=model, data_parallel_size=64).n_threads == 1
    assert resolved(model=model, data_parallel_size=64, threads=3).n_threads == 3


def test_float32_checkpoint_is_computed_in_bfloat16_on_a_gpu(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    (Path(model) / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"}))
    assert resolved(model=model).model.dtype == "bfloat16"
    assert resolved(model=model, dtype="float32").model.dtype == "float32"


def test_values_given_arrive(model: str) -> None:
    config = resolved(
        model=model,
        served_model_name="name",
        max_model_len=512,
        block_size=16,
        num_gpu_blocks_override=99,
        max_num_seqs=4,
        max_num_batched_tokens=100,
        enable_prefix_caching=False,
        enable_output_caching=False,
        gpu_memory_utilization=0.5,
        max_num_partial_prefills=3,
        max_long_partial_prefills=2,
        long_prefill_token_threshold=50,
        scheduler_max_size=7,
        scheduler_ttl=60,
        max_logprobs=-1,
        logprobs_mode="processed_logits",
        load_choices="dummy",
        seed=5,
        dtype="bfloat16",
        threads=2,
        enable_expert_parallel=True,
    )
    assert (config.model.served_name, config.model.max_model_len, config.model.seed) == ("name", 512, 5)
    assert config.model.random_weights
    assert config.model.dtype == "bfloat16"
    assert (config.cache.page_tokens, config.cache.n_pages, config.cache.memory_fraction) == (16, 99, 0.5)
    assert (config.cache.prefix_caching, config.cache.output_caching) == (False, False)
    scheduler = config.scheduler
    assert (scheduler.max_seqs, scheduler.max_batched_tokens, scheduler.max_partial_prefills) == (4, 100, 3)
    assert (scheduler.max_long_partial_prefills, scheduler.long_prefill_tokens) == (2, 50)
    assert (scheduler.max_waiting, scheduler.waiting_ttl_s) == (7, 60.0)
    assert (config.logprobs.max_logprobs, config.logprobs.mode) == (-1, "processed_logits")
    assert (config.n_threads, config.parallel.expert) == (2, True)


def test_eos_ids_of_both_files(model: str) -> None:
    (Path(model) / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "temperature": 0.5}))
    config = resolved(model=model)
    assert config.model.eos_token_ids == (7, 2)
    assert config.model.sampling_defaults["temperature"] == 0.5


def test_default_length_is_cut_to_model_and_cache(model: str) -> None:
    assert resolved(model=model, num_gpu_blocks_override=4, block_size=16).model.max_model_len == 64
    (Path(model) / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 300}))
    assert resolved(model=model).model.max_model_len == 300


def test_length_asked_for_is_not_cut(model: str) -> None:
    (line,) = problems(model=model, max_model_len=5000)
    assert "--max-model-len 5000" in line
    assert "4096 positions" in line
    (line,) = problems(model=model, max_model_len=100, num_gpu_blocks_override=4, block_size=16)
    assert "--max-model-len 100" in line
    assert "--num-gpu-blocks-override 4" in line
    assert "64 tokens" in line


def test_default_batch_fits_small_models_and_whole_prompts(model: str) -> None:
    assert resolved(model=model, max_model_len=32, max_num_seqs=2).scheduler.max_batched_tokens == 64
    whole = resolved(model=model, max_model_len=4096, enable_chunked_prefill=False)
    assert whole.scheduler.max_batched_tokens == 4096
    assert not whole.scheduler.chunked_prefill


def test_environment(model: str) -> None:
    environ = {"FD_LOG_DIR": "/tmp/fd_logs", "OMP_NUM_THREADS": "3,2", "FD_DISABLE_CHUNKED_PREFILL": "1"}
    config = resolved(environ, model=model)
    assert (config.log_dir, config.n_threads, config.scheduler.chunked_prefill) == ("/tmp/fd_logs", 3, False)
    assert resolved(environ, model=model, threads=1, enable_chunked_prefill=True).scheduler.chunked_prefill
    assert resolved({"OMP_NUM_THREADS": "many"}, model=model).n_threads is None


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"max_model_len": 15}, ["--max-model-len 15", "16"]),
        ({"max_num_seqs": 0}, ["--max-num-seqs 0", "1..256"]),
        ({"max_num_seqs": 257}, ["--max-num-seqs 257", "1..256"]),
        ({"block_size": 0}, ["--block-size 0", "1.."]),
        ({"num_gpu_blocks_override": 0}, ["--num-gpu-blocks-override 0", "1"]),
        ({"gpu_memory_utilization": 1.5}, ["--gpu-memory-utilization 1.5", "at most 1"]),
        ({"gpu_memory_utilization": 0}, ["--gpu-memory-utilization 0", "above 0"]),
        ({"max_num_batched_tokens": 70, "max_num_seqs": 80}, ["--max-num-batched-tokens 70", "--max-num-seqs (80)"]),
        ({"max_num_batched_tokens": 20}, ["--max-num-batched-tokens 20", "--block-size (64)"]),
        ({"max_num_batched_tokens": 20000, "max_num_seqs": 2}, ["--max-num-batched-tokens 20000", "4096"]),
        (
            {"max_num_batched_tokens": 100, "enable_chunked_prefill": False},
            ["--max-num-batched-tokens 100", "--max-model-len (2048)"],
        ),
        (
            {"max_num_partial_prefills": 2, "enable_chunked_prefill": False},
            ["--max-num-partial-prefills 2", "--enable-chunked-prefill"],
        ),
        ({"max_num_partial_prefills": 0}, ["--max-num-partial-prefills 0", "1"]),
        ({"max_long_partial_prefills": 2}, ["--max-long-partial-prefills 2", "1..1"]),
        (
            {"max_num_partial_prefills": 2, "long_prefill_token_threshold": 2048},
            ["--long-prefill-token-threshold 2048", "--max-model-len (2048)"],
        ),
        ({"max_logprobs": -2}, ["--max-logprobs -2", "-1"]),
        ({"max_logprobs": 101}, ["--max-logprobs 101", "100 tokens"]),
        ({"scheduler_ttl": 0}, ["--scheduler-ttl 0", "1"]),
        ({"threads": 0}, ["--threads 0", "1"]),
        ({"seed": -1}, ["--seed -1", "0"]),
        ({"device": "cuda"}, ["--device cuda", "no device"]),
        ({"tokenizer": "/nowhere"}, ["--tokenizer /nowhere", "no such folder"]),
        ({"engine_worker_queue_port": "1,2"}, ["--engine-worker-queue-port 1,2", "2 ports", "1 expected"]),
        ({"rdma_comm_ports": [70000]}, ["--rdma-comm-ports 70000", "65535"]),
        ({"data_parallel_size": 0}, ["--data-parallel-size 0: must be at least 1"]),
        ({"tensor_parallel_size": 0}, ["--tensor-parallel-size 0: must be at least 1"]),
        ({"data_parallel_size": 2, "local_data_parallel_id": 2}, ["--local-data-parallel-id 2: ", "0..1"]),
        ({"quantization": "wint3"}, ["--quantization wint3: ", "block_wise_fp8, wint8, wint4"]),
        ({"quantization": {"kind": "wint8"}}, ["--quantization: must be one of "]),
        ({"quantization": "block_wise_fp8"}, ["--quantization block_wise_fp8: needs a Hopper GPU", "wint8 and wint4"]),
        ({"innode_prefill_ports": "1"}, ["--innode-prefill-ports", "decode"]),
        ({"cache_transfer_protocol": "tcp"}, ["--cache-transfer-protocol", "ipc or rdma"]),
        (
            {"splitwise_role": "prefill", "pd_comm_port": "1,2", "rdma_comm_ports": "0"},
            ["--rdma-comm-ports 0", "65535"],
        ),
        ({"guided_decoding_backend": "xgrammar"}, ["--guided-decoding-backend xgrammar: not supported yet: "]),
        ({"speculative_config": {"method": "mtp"}}, ["--speculative-config: not supported yet: "]),
        ({"dynamic_load_weight": True}, ["--dynamic-load-weight: not supported yet: "]),
        ({"logits_processors": ["X"]}, ["--logits-processors: not supported yet: ", "logit_bias"]),
        ({"enable_eplb": True}, ["--enable-eplb: needs --enable-expert-parallel"]),
        ({"eplb_config": {}}, ["--eplb-config: only --enable-eplb takes it"]),
    ],
)
def test_one_contradiction_is_one_line(model: str, kwargs: dict[str, Any], parts: list[str]) -> None:
    (line,) = problems(model=model, **kwargs)
    for part in parts:
        assert part in line


def test_all_contradictions_are_reported_together(model: str) -> None:
    lines = problems(
        model=model, max_num_seqs=0, max_logprobs=-5, cache_transfer_protocol="tcp", max_model_len=9999, threads=0
    )
    assert len(lines) == 5


def test_a_password_is_not_shown(model: str) -> None:
    assert "hunter2" not in repr(resolved(model=model, scheduler_password="hunter2"))
    assert "hunter2" not in repr(resolve_admission(EngineArgs(scheduler_password="hunter2")))


def test_the_same_said_otherwise_is_accepted(model: str) -> None:
    config = resolved(
        model=model,
        data_parallel_size=1,
        splitwise_role="mixed",
        guided_decoding_backend="off",
        guided_decoding_disable_any_whitespace="false",
        model_impl="fastdeploy",
        scheduler_host="127.0.0.1",
    )
    assert config.parallel.data == 1


def test_flag_without_effect_warns_once_by_name(model: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        resolved(model=model, swap_space=4, enable_mm=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert [line.split()[0] for line in warnings] == ["--enable-mm", "--swap-space"]


def test_internal_ports_are_noted_as_not_needed(model: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        resolved(model=model, cache_queue_port=8003)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "--cache-queue-port 8003" in line
    assert "not needed" in line


def test_ports_of_a_prefill_server(model: str) -> None:
    sizes: dict[str, Any] = {"model": model, "data_parallel_size": 4, "splitwise_role": "prefill"}
    eight = ",".join(str(7671 + i) for i in range(8))
    transfer = resolved(
        **sizes, pd_comm_port="2334", cache_queue_port="8183", rdma_comm_ports=eight, engine_worker_queue_port=eight
    ).transfer
    assert transfer.role == "prefill"
    assert transfer.control_ports == (2334, 2335, 2336, 2337)
    assert transfer.rank_ports == (7671, 7672, 7673, 7674)
    (line,) = problems(**sizes, pd_comm_port="1,2,3")
    assert "3 ports given, 4 expected" in line


def test_model_is_required() -> None:
    (line,) = problems()
    assert line.startswith("--model: required")


def test_hub_name_is_explained() -> None:
    (line,) = problems(model="baidu/ernie-45-turbo")
    assert line.startswith("--model baidu/ernie-45-turbo: ")
    assert "does not exist" in line
    assert "local folder with config.json" in line


def test_folder_without_config_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"")
    (line,) = problems(model=str(tmp_path))
    assert "no config.json" in line
    assert "weights.gguf" in line


def test_bad_config_json_is_reported_with_the_rest(model: str) -> None:
    (Path(model) / "config.json").write_text("{")
    lines = problems(model=model, max_num_seqs=0)
    assert len(lines) == 2
    assert any("config.json" in line for line in lines)


def test_server_args() -> None:
    assert resolve_server(ServerArgs(), {}) == ServerArgs()
    assert resolve_server(ServerArgs(), {"FD_API_KEY": "a, b,"}).api_key == ("a", "b")
    assert resolve_server(ServerArgs(api_key=("c",)), {"FD_API_KEY": "a"}).api_key == ("c",)
    assert resolve_server(ServerArgs(controller_port=-7, max_waiting_time=-9), {}).controller_port == -1


def test_server_contradictions() -> None:
    args = ServerArgs(port=70000, metrics_port=-1, workers=2, controller_port=8001, max_concurrency=0, timeout=-1)
    with pytest.raises(ConfigError) as caught:
        resolve_server(args, {})
    text = str(caught.value)
    assert len(text.splitlines()) == 6
    for flag in ("--port 70000", "--metrics-port -1", "--workers 2: not", "--controller-port 8001: not"):
        assert flag in text
    for flag in ("--max-concurrency 0", "--timeout -1"):
        assert flag in text


def test_server_and_engine_are_reported_together(model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_all(ServerArgs(workers=2), EngineArgs(model=model, max_num_seqs=0), {})
    assert len(str(caught.value).splitlines()) == 2
    server, config = resolve_all(ServerArgs(port=1), EngineArgs(model=model), {"FD_API_KEY": "k"})
    assert (server.port, server.api_key, config.model.path) == (1, ("k",), model)


def test_hardware_is_found_without_torch() -> None:
    assert n_usable_cpus() >= 1
    assert memory_bytes() > 2**26
    for device in cuda_devices():
        assert device.name
        assert device.memory_bytes > 2**30
        assert device.capability >= (3, 0)


def test_which_gpus_a_server_registers() -> None:
    second = ParallelConfig(tensor=2, data=4, data_rank=3, serves=(3,), hosts=("10.0.0.1", "10.0.0.2"))
    assert served_devices(second, {}) == ("2", "3")
    assert served_devices(second, {"CUDA_VISIBLE_DEVICES": "4,5,6,GPU-7"}) == ("6", "GPU-7")
    assert served_devices(ParallelConfig(data=2, serves=(0, 1)), {"CUDA_VISIBLE_DEVICES": ""}) == ("0", "1")
