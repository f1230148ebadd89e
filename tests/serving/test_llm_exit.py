"""However a script with an `LLM` ends, nothing of it is left: no process, no temporary file, no shared memory."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import Process, wait_for

pytestmark = pytest.mark.timeout(180)

# No `if __name__ == "__main__"`: nothing here is imported by a child.
START = """
from fastdeploy import LLM, SamplingParams
llm = LLM({model!r}, device="cpu", dtype="float32")
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
print("answer", llm.generate("the", params, use_tqdm=False)[0].outputs.token_ids, flush=True)
"""
LONG = "llm.generate(['the'] * 2000, SamplingParams(max_tokens=250, ignore_eos=True))"


@contextmanager
def script(model: Path, folder: Path, text: str, wait_for_answer: bool = True) -> Iterator[Process]:
    """A running script whose engine is up and has answered once."""
    (folder / "script.py").write_text(START.format(model=str(model)) + text)
    process = Process([str(folder / "script.py")], folder / "run")
    try:
        if wait_for_answer:
            wait_for(lambda: (process.tree() and "answer" in process.console) or process.popen.poll() is not None)
            assert "answer" in process.console, process.console
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("ernie4_5_moe", tokenizer=True)


@pytest.mark.parametrize(
    ("text", "status", "last_line"),
    [
        ("", 0, "answer"),
        ("llm.close(); llm.close()", 0, "answer"),
        ("with llm: pass", 0, "answer"),
        ("del llm", 0, "answer"),
        ("raise ValueError('of the user')", 1, "ValueError: of the user"),
        ("with llm: raise ValueError('of the user')", 1, "ValueError: of the user"),
        ("import sys; sys.exit(7)", 7, "answer"),
        ("import os; os._exit(8)", 8, "answer"),
    ],
)
def test_script_ends(model: Path, tmp_path: Path, text: str, status: int, last_line: str) -> None:
    with script(model, tmp_path, "import time; time.sleep(0.5)\n" + text) as process:
        assert len(process.tree()) == 3
        assert process.end() == status
        process.check_nothing_left()
        assert process.console.splitlines()[-1].startswith(last_line), process.console
        assert "Exception ignored" not in process.console


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_in_the_middle_of_a_call(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    with script(model, tmp_path, LONG) as process:
        time.sleep(0.5)
        assert len(process.tree()) == 3 and process.shared_memory() == []
        process.popen.send_signal(number)
        assert process.end() == -number
        process.check_nothing_left()
        assert ("KeyboardInterrupt" in process.console) == (number is signal.SIGINT)


def test_interrupt_while_it_starts(model: Path, tmp_path: Path) -> None:
    with script(model, tmp_path, "", wait_for_answer=False) as process:
        assert process.core
        process.popen.send_signal(signal.SIGINT)
        assert process.end() == -signal.SIGINT
        process.check_nothing_left()
        assert "answer" not in process.console and "KeyboardInterrupt" in process.console


def test_killed_while_a_rank_is_stopped(model: Path, tmp_path: Path) -> None:
    """A stopped process cannot notice the end of its lifeline; the kernel ends it."""
    with script(model, tmp_path, LONG) as process:
        process.rank.send_signal(signal.SIGSTOP)
        process.popen.kill()
        process.end()
        process.check_nothing_left()
