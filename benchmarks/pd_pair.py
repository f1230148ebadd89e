"""A router, a prefill and a decode server on this machine's CPU, and clients that compare answers token by token."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import httpx
import psutil
from synthetic_fleet import HOST, Program, metrics_of

if TYPE_CHECKING:
    from network_namespaces import Machine

Role: TypeAlias = Literal["prefill", "decode", "mixed"]

ANSWER_S = 150.0
SETTLE_S = 45.0  # a lease is 30 s
READY = r"ready at (http://\S+)"
LEFT = ("pd_lent_blocks", "pd_awaiting_requests", "gpu_cache_usage_perc", "num_requests_running")


class Node(Program):
    """One api_server."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        role: Role,
        flags: Sequence[str],
        router: str = "",
        machine: Machine | None = None,
    ) -> None:
        """On that machine, or on this one."""
        host = machine.address if machine else HOST
        own = ["--model", str(model), "--host", host, "--port", "0", "--device", "cpu", "--dtype", "float32"]
        own += ["--splitwise-role", role, *(["--router", router] if router else []), *flags]
        super().__init__("fastdeploy.entrypoints.openai.api_server", own, folder, machine)
        self.role = role

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        return self.wait_for(READY)

    @property
    def is_ready(self) -> bool:
        """Whether it listens yet."""
        return re.search(READY, self.console) is not None

    def tree(self) -> list[psutil.Process]:
        """Its processes, itself first."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def signal_all(self, number: signal.Signals) -> None:
        """A signal to every process of the server."""
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        keys = (f"fastdeploy:{name}", f"fastdeploy:{name}{{")
        return sum(v for k, v in metrics_of(self.url).items() if k == keys[0] or k.startswith(keys[1]))

    def left(self) -> dict[str, float]:
        """What it holds of requests."""
        return {name: self.metric(name) for name in LEFT}


def n_descriptors(program: Program) -> int:
    """Open files and sockets of all its processes."""
    root = psutil.Process(program.process.pid)
    return sum(process.num_fds() for process in (root, *root.children(recursive=True)))


def router_load(url: str) -> float:
    """Requests that a router counts as in flight, in all and at each server."""
    names = ("router_requests_in_flight", "router_server_requests{")
    return sum(value for name, value in metrics_of(url).items() if name.startswith(names))


class Pair:
    """The three processes. `flags` go to both servers, `decode_flags` to that one as well.

    machines: for a pair on two machines: the router's and decode's, and prefill's. This process is on the first one.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        flags: Sequence[str],
        decode_flags: Sequence[str] = (),
        machines: tuple[Machine, Machine] | None = None,
    ) -> None:
        os.environ.setdefault("FD_GROUP_SECRET", secrets.token_hex(16))
        self._model, self._folder, self._number = model, folder, 0
        self._flags: dict[Role, Sequence[str]] = {"prefill": flags, "decode": [*flags, *decode_flags]}
        here, there = machines or (None, None)
        self._machine_of: dict[Role, Machine | None] = {"prefill": there, "decode": here}
        host = here.address if here else HOST
        self.router = Program(
            "fastdeploy.router.launch", ["--host", host, "--port", "0", "--splitwise"], folder / "router"
        )
        self.url = self.router.wait_for(r"Starting server on (http://[^\s,]+)")
        self.nodes: dict[Role, Node] = {}
        for role in self._flags:
            self.start(role)
        self.wait_registered()

    def start(self, role: Role) -> None:
        """Start a server; does not wait."""
        self._number += 1
        folder = self._folder / f"{role}{self._number}"
        router = self.url.removeprefix("http://")
        self.nodes[role] = Node(self._model, folder, role, self._flags[role], router, self._machine_of[role])

    def wait_registered(self) -> None:
        """Until the router has one server of each role and they are those that run now."""
        urls = {node.url for node in self.nodes.values()}
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            known = httpx.get(f"{self.url}/registered", timeout=30).json()
            if {one["url"] for role in ("prefill", "decode") for one in known[role]} == urls:
                return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"registered are {known}, expected {urls}")
            time.sleep(0.1)

    def settle(self) -> tuple[float, dict[str, dict[str, float]]]:
        """Seconds until both servers hold nothing, or what they hold after `SETTLE_S`."""
        start_s = time.monotonic()
        while True:
            left: dict[str, dict[str, float]] = {role: node.left() for role, node in self.nodes.items()}
            left["router"] = {"in flight": router_load(self.url)}
            took_s = time.monotonic() - start_s
            if took_s > SETTLE_S or not any(any(one.values()) for one in left.values()):
                return took_s, left
            time.sleep(0.2)

    def close(self) -> None:
        """End all."""
        for program in (*self.nodes.values(), self.router):
            with suppress(psutil.NoSuchProcess):
                if isinstance(program, Node):
                    program.signal_all(signal.SIGCONT)
            program.stop()


@dataclass(slots=True)
class Outcome:
    """What a client saw: tokens of each choice and how it ended. `left`: it went away by itself."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    error: str = ""
    cut: str = ""  # the connection ended without a word
    finished: bool = False
    left: bool = False

    def take(self, answer: dict[str, Any]) -> None:
        """A piece of the answer, or all of it."""
        if "error" in answer:
            self.error = answer["error"].get("message") or "?"
            return
        for choice in answer["choices"]:
            self.tokens.setdefault(choice["index"], []).extend(choice.get("completion_token_ids") or [])

    def verdict(self, expected: Outcome) -> str:
        """`right`, `left`, `error`, or what must not be: `wrong`, `no reason`."""
        for index, tokens in self.tokens.items():
            if expected.tokens[index][: len(tokens)] != tokens:
                return "wrong"
        if self.cut:
            return "no reason"
        if self.error:
            return "error"
        if self.left:
            return "left"
        return "right" if self.finished and self.tokens == expected.tokens else "no reason"


def make_prompts(n: int, seed: int, end: int, n_words: int = 20000, shortest: int = 4) -> list[list[int]]:
    """Prompts of random tokens of a vocabulary, of `shortest` to `end` - 1 tokens each."""
    rng = random.Random(seed)
    words = range(1000, 20000) if n_words >= 20000 else range(5, n_words)
    return [[rng.choice(words) for _ in range(rng.randrange(shortest, end))] for _ in range(n)]


def vocabulary(model: Path) -> int:
    """Size of a model's vocabulary."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def body_of(number: int, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """A request: greedy, seeded or two answers, by its number; always the same.

    Seeded ones take top_k: after random tokens the model finds thousands of tokens equally likely, and which of them is
    drawn hangs on the last bits of the logits, which on any server differ from batch to batch.
    """
    seeded: dict[str, Any] = {"temperature": 0.8, "seed": number, "top_k": 8}
    more = {**seeded, "n": 2} if number % 10 == 9 else seeded if number % 3 == 1 else {"temperature": 0}
    more = {**more, **({"logprobs": 2} if number % 5 == 4 else {})}
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True, **more}


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes away: after seconds, or with that many tokens of the first answer (of a stream)."""

    after_s: float = ANSWER_S
    n_tokens: int | None = None


async def ask(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], *, stream: bool, leave: Leave | None = None
) -> Outcome:
    """One request to its end, or until its client leaves."""
    outcome = Outcome()
    try:
        async with asyncio.timeout(leave.after_s if leave else ANSWER_S):
            if not stream:
                answer = await client.post(f"{url}/v1/completions", json=body)
                outcome.take(answer.json())
                outcome.finished = answer.status_code == 200
                return outcome
            async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: [DONE]"):
                        outcome.finished = True
                    elif line.startswith(("data: ", "{")):
                        outcome.take(json.loads(line.removeprefix("data: ")))
                        if leave and leave.n_tokens and len(outcome.tokens.get(0, [])) >= leave.n_tokens:
                            outcome.left = True
                            break
    except TimeoutError:
        outcome.left = leave is not None
    except httpx.HTTPError as error:
        outcome.cut = f"{type(error).__name__}: {error}"
    return outcome


async def ask_all(url: str, bodies: Sequence[dict[str, Any]], n_at_once: int, *, stream: bool | None) -> list[Outcome]:
    """All of them, `n_at_once` at a time; with None every second one is streamed."""
    gate = asyncio.Semaphore(n_at_once)

    async def one(number: int, body: dict[str, Any]) -> Outcome:
        async with gate:
            return await ask(client, url, body, stream=number % 2 == 0 if stream is None else stream)

    async with httpx.AsyncClient(timeout=ANSWER_S) as client:
        return list(await asyncio.gather(*(one(i, body) for i, body in enumerate(bodies))))
