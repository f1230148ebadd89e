"""The command line of multi_api_server: what it starts, and everything that can be wrong with it."""

import json
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fastdeploy.entrypoints.openai import multi_api_server
from fastdeploy.entrypoints.supervise.args import parse_command_line
from fastdeploy.entrypoints.supervise.plan import GroupPlan, make_plan
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

FREE = ("--ports", "0,0")
DP2 = ("--data-parallel-size", "2")
# From the documentation of the original, but for the model.
SEED = """--ports 1811,1822,1833,1844,1855,1866,1877,1888 --num-servers 8
  --metrics-ports 3101,3201,3301,3401,3501,3601,3701,3801 --args --model {model}
  --engine-worker-queue-port 25611,25621,25631,25641,25651,25661,25671,25681 --tensor-parallel-size 1
  --data-parallel-size 8 --max-model-len 12288 --max-num-seqs 64 --num-gpu-blocks-override 256
  --enable-expert-parallel"""
SEED_WITHOUT_QUEUES = """--num-servers 8 --ports 1811,1822,1833,1844,1855,1866,1877,1888
  --metrics-ports 3101,3201,3301,3401,3501,3601,3701,3801 --args --model {model} --tensor-parallel-size 1
  --data-parallel-size 8 --max-model-len 12288 --max-num-seqs 64 --num-gpu-blocks-override 256
  --enable-expert-parallel"""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("ernie4_5_moe", max_position_embeddings=16384))


def plan(words: Sequence[str], **environ: str) -> GroupPlan:
    launch, server_args = parse_command_line(words)
    return make_plan(launch, server_args, {"FD_LOG_DIR": "/logs", **environ})


def problems(words: Sequence[str], **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(words, **environ)
    return str(caught.value).splitlines()


def behind(model: str, *flags: str) -> tuple[str, ...]:
    return ("--args", "--model", model, "--device", "cpu", *DP2, *flags)


@contextmanager
def taken(n: int) -> Iterator[list[int]]:
    """Ports that somebody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("0.0.0.0", 0))) for _ in range(n)]
        yield [sock.getsockname()[1] for sock in sockets]


@pytest.mark.parametrize("command", [SEED, SEED_WITHOUT_QUEUES])
def test_documented_commands(model: str, command: str) -> None:
    found = plan([*command.format(model=model).split(), "--device", "cpu"], FD_ENABLE_MULTI_API_SERVER="1")
    ports = [(server.port, server.metrics_port) for server in found.servers]
    assert ports == [(1811 + 11 * i, 3101 + 100 * i) for i in range(8)]
    groups = set()
    for i, server in enumerate(found.servers):
        assert server.rank == server.index == i
        assert server.environ["FD_ENABLE_MULTI_API_SERVER"] == "1"
        assert server.environ["FD_LOG_DIR"] == f"/logs/log_{i}" == str(server.log_dir)
        argv = " ".join(server.argv(server.port, server.metrics_port))
        assert f"--local-data-parallel-id {i} --port {server.port} --metrics-port {server.metrics_port}" in argv
        assert f"--model {model}" in argv and argv.count("--enable-expert-parallel") == 1
        groups.add(server.environ["FD_GROUP"])
    assert len(groups) == 1 and found.restarts and found.drain_s is None


def test_left_out_ports(model: str) -> None:
    found = plan(["--ports", "0,0", *behind(model)])
    assert [(server.port, server.metrics_port) for server in found.servers] == [(0, 0), (0, 0)]
    assert all("--controller-port" not in server.command for server in found.servers)
    with taken(0):
        assert [server.port for server in plan(["--metrics-ports", "-1", *behind(model)]).servers] == [8000, 8002]


def test_flags_with_equals_signs_and_underscores(model: str) -> None:
    words = ("--args", f"--model={model}", "--device=cpu", "--data_parallel_size=2", "--timeout-graceful-shutdown=7")
    found = plan(["--num_servers=2", "--ports=0,0", "--restart=never", *words])
    assert len(found.servers) == 2 and not found.restarts and found.drain_s == 7
    assert found.servers[0].command[-4:] == ("--restart", "never", "--local-data-parallel-id", "0")


def test_replicas_without_expert_parallelism_are_no_group(model: str) -> None:
    assert "FD_GROUP" not in plan([*FREE, *behind(model)]).servers[0].environ


@pytest.mark.parametrize("flag", ["--ports", "--metrics-ports", "--controller-ports"])
def test_wrong_count(model: str, flag: str) -> None:
    first = FREE if flag != "--ports" else ()
    assert problems([*first, flag, "7001,7002,7003", *behind(model)]) == [
        f"{flag} 7001,7002,7003: Number of ports must match num-servers: 3 given, 2 expected"
    ]


def test_all_that_is_wrong_is_told_together(model: str) -> None:
    found = problems(
        [
            *("--num-servers", "3", "--ports", "1,70000,3", "--metrics-ports", "9"),
            *behind(model, "--port", "8000", "--metrics-port=1", "--local-data-parallel-id", "1", "--block-size", "0"),
        ]
    )
    assert [line.split(":")[0] for line in found] == [
        "--ports 1,70000,3",
        "--metrics-ports 9",
        "--port behind --args",
        "--metrics-port behind --args",
        "--local-data-parallel-id behind --args",
        "--num-servers 3",
        "--block-size 0",
    ]
    assert "--data-parallel-size 2 needs 2 here" in found[5]


def test_busy_ports_are_named_with_their_flags(model: str) -> None:
    with taken(1) as (free,):
        pass  # closed again: nothing says that the port beside a busy one is free
    with taken(3) as (port, metrics_port, queue_port):
        found = problems(
            [
                *("--ports", f"{port},0", "--metrics-ports", f"0,{metrics_port}"),
                *behind(model, "--engine-worker-queue-port", f"{queue_port},{free}"),
            ]
        )
    assert [line.split(":")[0] for line in found] == [
        f"--ports {port}",
        f"--metrics-ports {metrics_port}",
        f"--engine-worker-queue-port {queue_port}",
    ]
    assert all("Address already in use" in line for line in found)


def test_ports_given_twice(model: str) -> None:
    found = problems(
        ["--ports", "7001,7001", "--metrics-ports", "7002,7003", *behind(model, "--cache-queue-port", "7003,7004")]
    )
    assert found == [
        "--ports: port 7001 is given twice",
        "--metrics-ports and --cache-queue-port: port 7003 is given twice",
    ]


def test_metrics_on_the_http_port(model: str) -> None:
    with taken(2) as (first, second):
        pass
    found = plan(["--ports", f"{first},{second}", "--metrics-ports", f"{first},{second}", *behind(model)])
    assert [server.metrics_port for server in found.servers] == [first, second]


def test_servers_must_be_this_machines_share(model: str) -> None:
    (line,) = problems(["--num-servers", "1", "--args", "--model", model, "--device", "cpu", *DP2])
    assert line.startswith("--num-servers 1: --data-parallel-size 2 needs 2 here")
    (line,) = problems([*FREE, "--args", "--model", model, "--device", "cpu"])
    assert line.startswith("--num-servers 2: --data-parallel-size 1 needs 1 here")


def test_ranks_of_the_second_machine(model: str) -> None:
    flags = (
        "--args",
        "--model",
        model,
        "--device",
        "cpu",
        "--data-parallel-size",
        "4",
        "--ips",
        "203.0.113.1,127.0.0.1",
    )
    servers = plan([*FREE, *flags]).servers
    assert [(server.rank, server.log_dir.name) for server in servers] == [(2, "log_0"), (3, "log_1")]
    servers = plan([*FREE, *flags], FD_HOST_IP="203.0.113.1").servers
    assert [server.rank for server in servers] == [0, 1]
    (line,) = problems([*FREE, *flags], FD_HOST_IP="203.0.113.9")
    assert "FD_HOST_IP" in line and "203.0.113.9" in line
    (line,) = problems([*FREE, *flags[:-1], "203.0.113.1,203.0.113.2"])
    assert "203.0.113.1,203.0.113.2" in line and "FD_HOST_IP" in line
    (line,) = problems(["--num-servers", "4", *flags])
    assert "--num-servers 4: --data-parallel-size 4 over 2 machines (--ips) needs 2 here" in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--port", "1"], ["--port: a flag of the servers; write it behind --args"]),
        (["--prots", "1"], ["--prots: no such flag; did you mean --ports?"]),
        (["--ports", "one,two", "--args"], ["--ports", "expected an integer"]),
        ([], ["--args: missing"]),
        (["--num-servers", "0", *FREE, "--args", "--modle", "x"], ["--num-servers 0: must be at least 1"]),
        (["--args", "--modle", "x"], ["behind --args: --modle: no such flag; did you mean --model?"]),
        (["--args", "--max-num-seqs", "many"], ["behind --args: --max-num-seqs", "many"]),
        ([*FREE, "--args", "--model", "/no/such", *DP2], ["--model /no/such", "does not exist"]),
        ([*FREE, "--args", "--model", "/no/such", *DP2, "--ips", "127.0.0.1"], ["--model /no/such"]),
    ],
)
def test_wrong_words(words: list[str], named: list[str]) -> None:
    text = "\n".join(problems(words))
    assert all(name in text for name in named), text


def test_main_prints_each_problem_on_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "log"))
    words = ["--num-servers", "3", "--ports", "1,2", "--args", "--model", str(tmp_path), "--port", "1"]
    assert multi_api_server.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and all(line.startswith("fastdeploy: error: --") for line in lines), lines


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        multi_api_server.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(word in text for word in ("--metrics-ports", "--restart", "--args --model DIR", "Example:", "curl"))


def test_group_of_one_machine_is_random(model: str) -> None:
    words = [*FREE, *behind(model, "--enable-expert-parallel")]
    first, second = (json.loads(plan(words).servers[0].environ["FD_GROUP"]) for _ in range(2))
    assert first["endpoint"].startswith("ipc://@") and first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)


def test_group_of_several_machines_follows_from_the_command(model: str, caplog: pytest.LogCaptureFixture) -> None:
    words = [*FREE, *behind(model, "--enable-expert-parallel", "--ips", "127.0.0.1,203.0.113.7"), "--model"]
    words[1] = "0"
    words = ["--num-servers", "1", *words]

    def group(path: str, **environ: str) -> dict[str, str]:
        found: dict[str, str] = json.loads(plan([*words, path], **environ).servers[0].environ["FD_GROUP"])
        return found

    with caplog.at_level(logging.WARNING, "fastdeploy"):
        first, other = group(model), group(model, FD_HOST_IP="203.0.113.7")
    assert first == other and first["endpoint"] == "tcp://127.0.0.1:8001"
    assert caplog.text.count("the group is not protected") == 2
    caplog.clear()
    secret = group(model, FD_GROUP_SECRET="x")
    assert secret["secret_key"] != first["secret_key"] and secret == group(model, FD_GROUP_SECRET="x")
    assert secret != group(model, FD_GROUP_SECRET="y") and caplog.text == ""
    words[-1:] = ["--engine-worker-queue-port", "25611", "--model"]
    assert group(model)["endpoint"] == "tcp://127.0.0.1:25611"


def test_keys_are_a_pair(model: str) -> None:
    import zmq

    words = ["--num-servers", "1", "--ports", "0", *behind(model, "--enable-expert-parallel")]
    for extra in ([], ["--ips", "127.0.0.1,203.0.113.7"]):
        words[1], words[3] = ("1", "0") if extra else ("2", "0,0")
        found = json.loads(plan([*words, *extra]).servers[0].environ["FD_GROUP"])
        assert zmq.curve_public(found["secret_key"].encode()).decode() == found["public_key"]
