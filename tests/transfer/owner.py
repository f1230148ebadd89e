"""A rank in a process of its own that offers pages of known contents: `Owner` starts one, `serve` runs in it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from fastdeploy.transfer.base import Endpoint, PageSet, make_transport
from fastdeploy.transfer.layout import PageLayout
from fastdeploy.transfer.machine import machine_id
from fastdeploy.transfer.memory import PageMemory, allocate_pages

REPOSITORY = Path(__file__).parents[2]


def layout_of(tensor_rank: int = 0, tensor_size: int = 1, **changes: Any) -> PageLayout:
    """Three layers and 40 pages of four key heads in all; `changes` are fields of PageLayout."""
    n_heads = max(1, 4 // tensor_size)
    fields: dict[str, Any] = {"n_layers": 3, "n_pages": 40, "page_tokens": 16, "head_dim": 24, "dtype": "float32"}
    cut = {"n_kv_heads": n_heads, "first_kv_head": tensor_rank * 4 // tensor_size, "total_kv_heads": 4}
    return PageLayout(**{**fields, **cut, "tensor_rank": tensor_rank, "tensor_size": tensor_size, **changes})


def fill(memory: PageMemory, seed: int) -> None:
    """Every head gets contents that depend on the seed, the layer and its number in the model alone."""
    cut = memory.layout
    for layer in range(cut.n_layers):
        for head in range(cut.n_kv_heads):
            numbers = torch.Generator().manual_seed(1000 * seed + 10 * layer + cut.first_kv_head + head)
            for kind in range(2):
                shape = (cut.n_pages, cut.page_tokens, cut.head_dim)
                memory.layer(layer)[:, kind, head] = torch.randn(shape, generator=numbers)


class Owner:
    """A process with pages of `layout`; keyword arguments of the constructor are those of `serve`."""

    def __init__(self, layout: PageLayout, names: Sequence[str], *, launch: Sequence[str] = (), **given: Any) -> None:
        arguments = {"layout": msgspec.to_builtins(layout), "names": list(names), **given}
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
        command = [*(launch or (sys.executable,)), str(Path(__file__)), json.dumps(arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            self.endpoint = msgspec.msgpack.decode(self._answer(), type=Endpoint)
        except BaseException:
            self.close()
            raise

    def call(self, **command: Any) -> bytes:
        """One of the commands of `obey`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def offer(self, page_ids: Sequence[int], request_id: str = "r", generation: int = 1, **layers: int) -> PageSet:
        """All layers of these pages, or `first_layer` and `n_layers`."""
        answer = self.call(do="offer", page_ids=list(page_ids), request_id=request_id, generation=generation, **layers)
        return msgspec.msgpack.decode(answer, type=PageSet)

    def spoil(self, layer: int, page: int) -> None:
        """Change one word of a page, as if it had been given to another request."""
        self.call(do="spoil", layer=layer, page=page)

    def stop(self) -> None:
        """Returns when no thread of it runs any more."""
        self.process.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 30
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until
            time.sleep(0.001)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        """End it, in whatever state it is."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> bytes:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the owner's process has ended; see its stderr"
        return base64.b64decode(line)


def serve(
    layout: PageLayout,
    names: Sequence[str],
    owner: str,
    seed: int = 1,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "cpu",
) -> None:
    """Offer pages until stdin ends."""
    memory = allocate_pages(layout, torch.device(device), owner, shared="shm" in names)
    fill(memory, seed)
    transports = {name: make_transport(name, memory, owner, host, port) for name in names}
    offers = {name: transport.offer() for name, transport in transports.items()}
    say(msgspec.msgpack.encode(Endpoint(owner, host, machine_id(), memory.pages.device.type, layout, offers)))
    for line in sys.stdin:
        say(obey(memory, owner, json.loads(line)))
    for transport in transports.values():
        transport.close()


def obey(memory: PageMemory, owner: str, command: dict[str, Any]) -> bytes:
    match command.pop("do"):
        case "offer":
            command = {"first_layer": 0, "n_layers": memory.layout.n_layers, **command}
            checks = memory.checks(command["page_ids"], command["first_layer"], command["n_layers"])
            return msgspec.msgpack.encode(PageSet(owner=owner, checks=checks, **command))
        case "spoil":
            memory.pages[command["layer"], command["page"], -8] ^= 1
            memory.pages[command["layer"], command["page"], -8].item()  # a GPU has done it then
            return b""
        case other:
            raise ValueError(other)


def say(answer: bytes) -> None:
    print(base64.b64encode(answer).decode(), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    serve(msgspec.convert(given.pop("layout"), PageLayout), **given)
