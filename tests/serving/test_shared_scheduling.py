"""The Redis schedulers with real engines: `LLM` as in the original's documentation, servers, errors at start."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import API_SERVER, CPU_FLAGS, PATIENCE_S, Process, serving

from fastdeploy import LLM, SamplingParams
from fastdeploy.admission.private_redis import PrivateRedis
from fastdeploy.errors import ConfigError
from fastdeploy.frontend.client import Inbox
from fastdeploy.wire.messages import Submit

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.fixture(scope="module")
def redis() -> Iterator[PrivateRedis]:
    with PrivateRedis() as running:
        yield running


def test_offline_over_two_ranks_and_a_continuation(
    model: Path, redis: PrivateRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are those of the local scheduler; one that goes on behind half of itself ends the same, seeded too."""
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path))
    prompts = [[5, 6, 7, i] for i in range(6)]
    params = [SamplingParams(temperature=t, seed=9, max_tokens=12, ignore_eos=True) for t in (0.0, 0.9)]
    flags = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
    with LLM(str(model), **flags) as llm:
        expected = [[o.outputs.token_ids for o in llm.generate(prompts, p, use_tqdm=False)] for p in params]

        async def rest(known: list[int], p: SamplingParams) -> list[int]:
            inbox, found = Inbox(), list(known)
            checked = llm._generator.check(prompts[0], p)
            llm._generator._engine.submit([Submit("rest", prompts[0], checked, time.time(), output_ids=known)], inbox)
            while True:
                for delta in await inbox.take():
                    assert delta.finish_reason in (None, "length"), delta
                    found += delta.token_ids
                    if delta.finish_reason:
                        return found

        for p, of_p in zip(params, expected, strict=True):
            assert llm._run(rest(of_p[0][:5], p)) == of_p[0]
    with LLM(
        str(model),
        **flags,
        data_parallel_size=2,
        enable_expert_parallel=True,
        engine_worker_queue_port="6077,6078",
        scheduler_name="splitwise",
        scheduler_host=redis.host,
        scheduler_port=redis.port,
        scheduler_password=redis.password,
        scheduler_topic="test",
    ) as llm:
        for p, of_p in zip(params, expected, strict=True):
            assert [o.outputs.token_ids for o in llm.generate(prompts, p, use_tqdm=False)] == of_p


def test_servers_share_and_one_dies(model: Path, redis: PrivateRedis, tmp_path: Path) -> None:
    flags = ["--scheduler-name", "splitwise", *redis.flags, "--scheduler-topic", "servers", "--scheduler-ttl", "9000"]
    with serving(model, tmp_path / "a", *flags) as a, serving(model, tmp_path / "b", *flags) as b:
        alone = a.complete(prompt="the", max_tokens=40).json()["choices"][0]["text"]
        for _ in range(40):
            assert a.complete(prompt="the other " * 20, max_tokens=2).status_code == 200
            if b.metric("generation_tokens_total"):
                break
        assert b.metric("generation_tokens_total") > 0
        b.kill()
        assert a.complete(prompt="the", max_tokens=40).json()["choices"][0]["text"] == alone
        assert '"redis":"reachable"' in a.health_text().replace(" ", "")
        assert (tmp_path / "a" / "log" / "scheduler.log").exists()


@pytest.mark.parametrize(
    ("wrong", "said"), [("port", "fastdeploy redis --port 1"), ("password", "--scheduler-password")]
)
def test_no_usable_redis_at_start(model: Path, redis: PrivateRedis, tmp_path: Path, wrong: str, said: str) -> None:
    port = 1 if wrong == "port" else redis.port
    flags = ["--scheduler-name", "splitwise", "--scheduler-port", str(port), "--scheduler-password", "no"]
    server = Process([*API_SERVER, "--model", str(model), "--port", "0", *CPU_FLAGS, *flags], tmp_path / "s")
    assert server.end(PATIENCE_S) == 2
    assert said in server.console


def test_dp_rank(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "s", "--data-parallel-size", "2", "--scheduler-name", "dp") as server:
        for _ in range(3):
            assert server.complete(dp_rank=1).status_code == 200
        refused = server.complete(dp_rank=2)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "dp_rank"


def test_flags_out_of_range_are_named() -> None:
    from fastdeploy.config.admission import resolve_admission
    from fastdeploy.config.args import EngineArgs

    with pytest.raises(ConfigError, match=r"--scheduler-expire-period 5: .*\n--scheduler-writer-parallel 0"):
        resolve_admission(EngineArgs(scheduler_expire_period=5, scheduler_writer_parallel=0))
    config = resolve_admission(EngineArgs(scheduler_name="global", scheduler_sync_period=7, scheduler_db=3))
    assert (config.sync_period_s, config.expire_period_s, config.db) == (0.007, 3.0, 3)
