"""`fastdeploy demo` and `fastdeploy serve-demo`: real servers with the demo model, and requests to show that they work.

The demo starts two data-parallel ranks that share the experts, as a user would, with an endpoint each. It talks to both
through the official `openai` client, prints what came back with its timings and what each rank did, stops the servers
and checks that they ended in order.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

from fastdeploy.demo.model import build_demo_model
from fastdeploy.demo.rank_load import load_table, rank_load
from fastdeploy.demo.server_process import ServerProcess
from fastdeploy.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MODEL_NAME = "demo"
PROMPTS = (
    "Hello, my name is",
    "你好，请问今天是星期",
    "请写6个以数字开头的成语",
    "写一个300字的小说大纲，内容是李白穿越到现代，最后成为公司文职人员的故事",
    "我要采访一位科幻作家，创建一个包含5个问题的列表",
)
QUESTION = "Name three good things to eat for breakfast, and say why."
N_RANKS = 2
# A demo needs little: small limits make the cache small and the start quick.
LAUNCH_FLAGS = ("--num-servers", str(N_RANKS), "--ports", ",".join(["0"] * N_RANKS), "--args")
SERVER_FLAGS = (
    *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1"),
    *("--data-parallel-size", str(N_RANKS), "--enable-expert-parallel"),
    *("--max-model-len", "1024", "--num-gpu-blocks-override", "64"),
)
NOTE = "The model is real but small and speaks English only: judge the serving here, not the Chinese."
START_PATIENCE_S = 300.0
ANSWER_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times count from the moment the request was sent."""

    prompt: str
    text: str
    n_tokens: int
    first_token_s: float
    last_token_s: float

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token; 0 for an answer of one token."""
        return (self.n_tokens - 1) / max(self.last_token_s - self.first_token_s, 1e-6)


def run_demo(max_tokens: int, output: TextIO = sys.stdout) -> None:
    """Everything the demo does. Raises FastDeployError, with the server's last lines where they help."""
    if find_spec("openai") is None:
        raise ConfigError("the demo talks through the openai package: pip install 'fastdeploy[demo]'")
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens}: must be at least 1")
    folder = build_demo_model(show_progress=sys.stderr.isatty())
    console = _Console(output)
    console.line(f"starting {N_RANKS} data-parallel ranks that share the experts of the demo model in {folder}")
    # A slow import, done while the servers start.
    threading.Thread(target=import_module, args=("openai",), name="import openai", daemon=True).start()
    argv = [*LAUNCH_FLAGS, "--model", str(folder), *SERVER_FLAGS]
    with ServerProcess(argv, server_environment(os.environ), N_RANKS, console.server_line) as server:
        endpoints = server.wait_ready(START_PATIENCE_S, console.waiting)
        console.end_of_start()
        with _client_errors(server, console):
            start_s = time.monotonic()
            answers_d = asyncio.run(_ask_all([endpoint.url for endpoint in endpoints], max_tokens, console))
            total_s = time.monotonic() - start_s
            loads = [rank_load(endpoint.metrics_url) for endpoint in endpoints]
        for line in [*report(answers_d, total_s), *load_table(loads), NOTE]:
            console.line(line)
    console.line("The servers stopped in order (status 0).")


def server_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the demo's server: without API keys, which the demo does not send."""
    return {key: value for key, value in environ.items() if key != "FD_API_KEY"}


def serve_demo(argv: Sequence[str]) -> int:
    """Serve the demo model until a signal comes; `argv` are further flags of the server. Returns its exit status."""
    folder = build_demo_model(show_progress=sys.stderr.isatty())
    flags = ["--model", str(folder), "--host", "127.0.0.1", "--port", "8180", *argv]
    from fastdeploy.config.args import EngineArgs, ServerArgs
    from fastdeploy.config.flags import build_parser

    parser = build_parser("fastdeploy serve-demo", ServerArgs, EngineArgs)
    server = ServerArgs.from_namespace(parser.parse_flags(flags))
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    print(snippets(f"http://{host}:{server.port}"), flush=True)
    status: int = import_module("fastdeploy.entrypoints.openai.api_server").main(flags)
    return status


def snippets(url: str) -> str:
    """Lines to paste into another terminal."""
    return f"""When the server says "ready", paste one of these into another terminal; Ctrl-C here stops the server.

curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{MODEL_NAME}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 64}}'

python3 - <<'END'   # needs: pip install openai
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
for part in client.completions.create(model="{MODEL_NAME}", prompt="Once upon a time", max_tokens=64, stream=True):
    print(part.choices[0].text, end="", flush=True)
END
"""


def report(answers_d: Sequence[Sequence[Answer]], total_s: float) -> list[str]:
    """Every answer of rank 0 but the first, which was shown as it came, then a table of all ranks' timings."""
    first = answers_d[0]
    lines = []
    for number, answer in enumerate(first[1:], 2):
        lines += ["", f"[{number}] {answer.prompt}", _indented(answer.text), f"    ({_timing(answer)})"]
    heads = "".join(f"  rank {rank}: first token  tokens/s" for rank in range(len(answers_d)))
    lines += ["", f" {'':>3} {'tokens':>6}{heads}   prompt"]
    for i, answer in enumerate(first):
        cells = "".join(f"{a[i].first_token_s:>20.2f} s{a[i].tokens_per_s:>10.1f}" for a in answers_d)
        lines.append(f" {f'[{i + 1}]':>3} {answer.n_tokens:>6}{cells}   {answer.prompt}")
    answers = [answer for of_rank in answers_d for answer in of_rank]
    n_tokens = sum(answer.n_tokens for answer in answers)
    together = f"{n_tokens} tokens in {total_s:.1f} s, {n_tokens / max(total_s, 1e-6):.1f} tokens/s together"
    n_same = sum(len({a[i].text for a in answers_d}) == 1 for i in range(len(first)))
    return [
        *lines,
        "",
        f"{len(answers)} requests at once: {together}",
        f"{n_same} of {len(first)} answers are the same text on all {len(answers_d)} ranks",
    ]


class _Console:
    """What the user sees. On a terminal, a counter of seconds while nothing else happens."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._counts = output.isatty()
        self._starting = True

    def line(self, text: str) -> None:
        self._write(f"{text}\n")

    def text(self, text: str) -> None:
        self._write(text)

    def waiting(self, waited_s: float) -> None:
        if self._counts:
            self._write(f"\r  {waited_s:.0f} s ")

    def server_line(self, text: str) -> None:
        """Start-up lines are shown; later ones would fall between the words of an answer."""
        if self._starting:
            self._write(f"{chr(13) if self._counts else ''}  {text}\n")

    def end_of_start(self) -> None:
        self._starting = False

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


@contextmanager
def _client_errors(server: ServerProcess, console: _Console) -> Iterator[None]:
    """What the client raises, as an EngineError with the server's last lines."""
    try:
        yield
    except Exception as error:  # from the client, from the HTTP library below it, or a group of such
        console.line("")  # the text of an answer may stand there without an end of line
        first = _first(error)
        raise EngineError(f"a request failed: {type(first).__name__}: {first}{server.last_lines()}") from error


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _ask_all(urls: Sequence[str], max_tokens: int, console: _Console) -> list[list[Answer]]:
    """All requests to all ranks at once: a chat, which rank 0 shows as it comes, and the prompts."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    n_each = 1 + len(PROMPTS)
    console.text(f"\n{n_each} requests to each of {len(urls)} ranks at once; the first is shown as it comes\n\n")
    console.text(f"[1] {QUESTION}\n    ")
    running: list[list[asyncio.Task[Answer]]] = []
    async with AsyncExitStack() as stack, asyncio.timeout(ANSWER_PATIENCE_S), asyncio.TaskGroup() as tasks:
        for rank, url in enumerate(urls):
            # trust_env: a proxy of the environment does not know this machine's loopback
            http = DefaultAsyncHttpxClient(trust_env=False)
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)
            await stack.enter_async_context(client)
            show = _nothing if rank else (lambda text: console.text(_hanging(text)))
            running.append([tasks.create_task(_chat(client, max_tokens, show))])
            running[-1] += [tasks.create_task(_complete(client, prompt, max_tokens)) for prompt in PROMPTS]
    answers_d = [[task.result() for task in of_rank] for of_rank in running]
    console.line(f"\n    ({_timing(answers_d[0][0])})")
    return answers_d


async def _chat(client: AsyncOpenAI, max_tokens: int, show: Callable[[str], None]) -> Answer:
    watch = _Stopwatch(QUESTION)
    stream = await client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                watch.piece(choice.delta.content)
                show(choice.delta.content)
        if chunk.usage is not None:
            watch.n_tokens = chunk.usage.completion_tokens
    return watch.answer()


async def _complete(client: AsyncOpenAI, prompt: str, max_tokens: int) -> Answer:
    watch = _Stopwatch(prompt)
    stream = await client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            watch.piece(choice.text)
        if chunk.usage is not None:
            watch.n_tokens = chunk.usage.completion_tokens
    return watch.answer()


class _Stopwatch:
    """Gathers the pieces of one stream and when they came."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._start_s = time.monotonic()
        self._times_s: list[float] = []
        self._pieces: list[str] = []
        self.n_tokens = 0

    def piece(self, text: str) -> None:
        self._times_s.append(time.monotonic() - self._start_s)
        self._pieces.append(text)

    def answer(self) -> Answer:
        """Raises EngineError for a stream that ended without a token."""
        if not self._times_s or self.n_tokens < 1:
            raise EngineError(f"the server sent no token for {self._prompt!r}")
        return Answer(self._prompt, "".join(self._pieces), self.n_tokens, self._times_s[0], self._times_s[-1])


def _timing(answer: Answer) -> str:
    return (
        f"{answer.n_tokens} tokens, the first after {answer.first_token_s:.2f} s, "
        f"then {answer.tokens_per_s:.1f} tokens/s"
    )


def _nothing(_: str) -> None:
    """One answer on the screen at a time."""


def _hanging(text: str) -> str:
    return text.replace("\n", "\n    ")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines() if line.strip())
