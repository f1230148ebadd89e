"""One group over two machines, each a network namespace: the same command on both, and what happens to the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from group_server import BACK_S, reason
from network_namespaces import Machine, two_machines
from processes import API_SERVER, CPU_FLAGS, Process, Server, wait_for

from fastdeploy import LLM, SamplingParams

pytestmark = pytest.mark.timeout(300)

PROMPTS = [[5 + i, 7, 9, *range(3, 3 + 4 * i)] for i in range(10)]
NOTICED_S = 15.0


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as found:
        yield found


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one rank answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_LOG_DIR", str(tmp_path_factory.mktemp("log")))
        with LLM(str(model), device="cpu", dtype="float32") as llm:
            found = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
            return [output.outputs.token_ids for output in found]


class RemoteServer(Server):
    """An api_server on one of the machines."""

    def __init__(self, machine: Machine, model: Path, folder: Path, *flags: str, env: dict[str, str]) -> None:
        args = (*API_SERVER, "--model", str(model), "--host", "127.0.0.1", "--port", "0", *CPU_FLAGS, *flags)
        Process.__init__(self, machine.command(args), folder, env)
        self.machine = machine
        self.url = ""

    def why_down(self) -> str:
        """Why /health is false; empty while it is true."""
        return self.machine.call(lambda: reason(self))

    def check_answers(self, expected: list[list[int]]) -> None:
        """All prompts, at once."""
        body = {"prompt": PROMPTS, "max_tokens": 8, "return_token_ids": True}
        answer = self.machine.call(lambda: self.complete(**body))
        assert answer.status_code == 200, answer.text
        assert [choice["completion_token_ids"] for choice in answer.json()["choices"]] == expected

    def check_nothing_left(self, seconds: float = 10.0) -> None:
        Process.check_nothing_left(self, seconds)


def flags_of(machines: tuple[Machine, Machine], n_data: int = 4) -> tuple[str, ...]:
    ips = ",".join(machine.address for machine in machines)
    return ("--ips", ips, "--data-parallel-size", str(n_data), "--enable-expert-parallel", "--max-model-len", "256")


@contextmanager
def server_on(
    machines: tuple[Machine, Machine], index: int, model: Path, folder: Path, **env: str
) -> Iterator[RemoteServer]:
    secret = {"FD_GROUP_SECRET": "of the test", **env}
    server = RemoteServer(machines[index], model, folder, *flags_of(machines), env=secret)
    try:
        yield server
    finally:
        server.kill()


def test_the_same_command_on_both(
    machines: tuple[Machine, Machine], model: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    """Two ranks each, answers of both, a cable that is pulled out, a machine that dies and comes back."""
    with server_on(machines, 0, model, tmp_path / "a") as first:
        with server_on(machines, 1, model, tmp_path / "b", FD_HOST_IP=machines[1].address) as second:
            for server in (first, second):
                server.wait_ready()
                assert len(server.tree()) == 5
            for server in (first, second, first):
                server.check_answers(expected)
            machines[1].plug(connected=False)
            for server, other in ((first, "rank 2, 3 has been silent"), (second, "rank 0, which leads the group")):
                wait_for(server.why_down, NOTICED_S, "health to turn false")
                assert other in server.console or other in wait_for(server.why_down)
            machines[1].plug(connected=True)
            for server in (first, second):
                wait_for(lambda server=server: not server.why_down(), 2 * BACK_S, "health to turn true again")
            for server in (first, second):
                server.check_answers(expected)
            second.popen.kill()
            wait_for(first.why_down, NOTICED_S, "health to turn false")
            second.check_nothing_left()
        with server_on(machines, 1, model, tmp_path / "c") as second:
            second.wait_ready()
            wait_for(lambda: not first.why_down(), 2 * BACK_S, "health to turn true again")
            for server in (first, second):
                server.check_answers(expected)
                server.tree()
            for server in (first, second):  # either stays until both are told to stop
                server.popen.terminate()
            for server in (first, second):
                assert server.end() == 0
                server.check_nothing_left()


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (0, ["data-parallel rank 2 on 10.77.0.2, 3 on 10.77.0.2 did not join"]),
        (1, ["data-parallel rank 0 on 10.77.0.1 did not answer at tcp://10.77.0.1:8001"]),
    ],
)
def test_a_machine_that_does_not_come(
    machines: tuple[Machine, Machine], model: Path, tmp_path: Path, index: int, named: list[str]
) -> None:
    with server_on(machines, index, model, tmp_path / "run", FD_GROUP_TIMEOUT="5") as server:
        assert server.end(60) == 1
        server.check_nothing_left()
        errors = [line for line in server.console.splitlines() if line.startswith("fastdeploy: error: ")]
        assert len(errors) == 1, server.console
        assert all(text in errors[0] for text in [*named, "within 5 s (FD_GROUP_TIMEOUT)", "check that"]), errors


def test_another_secret_does_not_come_in(machines: tuple[Machine, Machine], model: Path, tmp_path: Path) -> None:
    with (
        server_on(machines, 0, model, tmp_path / "a", FD_GROUP_TIMEOUT="15") as first,
        server_on(machines, 1, model, tmp_path / "b", FD_GROUP_TIMEOUT="10", FD_GROUP_SECRET="another") as second,
    ):
        assert second.end(60) == 1 and "did not answer" in second.console
        assert first.end(60) == 1 and "did not join" in first.console


SCRIPT = """
from fastdeploy import LLM, SamplingParams
llm = LLM({model!r}, device="cpu", dtype="float32", ips={ips!r}, data_parallel_size=2, enable_expert_parallel=True)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
found = llm.generate({prompts!r}, params, use_tqdm=False)
print("answers", llm._check_master(), [output.outputs.token_ids for output in found], flush=True)
"""


def test_library_on_both(
    machines: tuple[Machine, Machine], model: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    ips = ",".join(machine.address for machine in machines)
    (tmp_path / "script.py").write_text(SCRIPT.format(model=str(model), ips=ips, prompts=PROMPTS))
    env = {"FD_GROUP_SECRET": "of the test"}
    processes = [
        Process(machine.command([str(tmp_path / "script.py")]), tmp_path / machine.namespace, env)
        for machine in machines
    ]
    try:
        for process, is_master in zip(processes, (True, False), strict=True):
            assert process.end(120) == 0, process.console
            assert f"answers {is_master} {expected}" in process.console
            process.check_nothing_left()
    finally:
        for process in processes:
            process.kill()
