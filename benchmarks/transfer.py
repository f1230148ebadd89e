"""KV pages read from another process, against what memory and network give by themselves: turn by turn, in one run.

    python benchmarks/transfer.py            # half a minute
    python benchmarks/transfer.py --quick    # smoke check

`shm` against a memcpy of as many bytes in one thread (the read also checks each page), `tcp` against a plain TCP stream
over loopback, and `nixl` over TCP too where it is installed. Pages were touched before; the owner is a process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from report import Report, compare

from fastdeploy.transfer.base import Endpoint, PageSet, Transport, make_transport
from fastdeploy.transfer.layout import PageLayout
from fastdeploy.transfer.memory import allocate_pages, copy_pages

NAME = "transfer"
TARGET = 0.5
CPU = torch.device("cpu")


def layout(n_pages: int) -> PageLayout:
    """Eight layers of an ERNIE-4.5-21B-A3B in bfloat16: 128 KiB a page and layer."""
    cut = {"n_kv_heads": 4, "first_kv_head": 0, "total_kv_heads": 4, "tensor_rank": 0, "tensor_size": 1}
    return PageLayout(n_layers=8, n_pages=n_pages, page_tokens=64, head_dim=128, dtype="bfloat16", **cut)


def serve(n_pages: int, names: Sequence[str]) -> None:
    """The owner's process: one line with its endpoint and all pages as a page set, then it waits for stdin to end."""
    import msgspec

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cut = layout(n_pages)
    memory = allocate_pages(cut, CPU, "owner", shared=True)
    memory.pages.random_(0, 256)
    transports = {name: make_transport(name, memory, "owner", "127.0.0.1") for name in names}
    offers = {name: transport.offer() for name, transport in transports.items()}
    endpoint = Endpoint("owner", "127.0.0.1", "here", "cpu", cut, offers)
    page_ids = list(range(n_pages))
    random.seed(0)
    random.shuffle(page_ids)
    source = PageSet("owner", "r", 0, page_ids, 0, cut.n_layers, memory.checks(page_ids, 0, cut.n_layers))
    print(msgspec.msgpack.encode((endpoint, source)).hex(), file=answers, flush=True)
    sys.stdin.read()
    for transport in transports.values():
        transport.close()


def pull_seconds(transport: Transport, endpoint: Endpoint, source: PageSet) -> float:
    peer = transport.connect(endpoint)
    started = time.perf_counter()
    pull = transport.pull(peer, source, range(len(source.page_ids)), 120.0)
    while transport.poll(pull) == "pending":
        time.sleep(0.0002)
    transport.forget(source.request_id)
    return time.perf_counter() - started


def stream_seconds(n_bytes: int) -> float:
    """A plain stream between two threads out of buffers that stay in the caches; they hold no lock meanwhile."""
    piece, got = bytes(1 << 20), bytearray(1 << 20)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
        listener.accept()[0] as receiver,
    ):

        def send() -> None:
            for _ in range(n_bytes >> 20):
                sender.sendall(piece)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        started = time.perf_counter()
        thread.start()
        while receiver.recv_into(got):
            pass
        seconds = time.perf_counter() - started
        thread.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("UCX_TLS", "tcp")  # as between machines without RDMA; the owner inherits it
    names = ["shm", "tcp", *(["nixl"] if importlib.util.find_spec("nixl") else [])]
    n_pages, n_rounds = (32, 2) if flags.quick else (512, flags.rounds)
    measure(Report(NAME, "Reads of KV pages", {"rounds": n_rounds, "n_pages": n_pages, "UCX_TLS": "tcp"}), names, flags)


def measure(report: Report, names: list[str], flags: argparse.Namespace) -> None:
    """Take turns, and write the summary."""
    import msgspec

    n_pages = report.settings["n_pages"]
    cut = layout(n_pages)
    report.settings["bytes"] = cut.total_bytes
    memory = allocate_pages(cut, CPU, "reader", shared=True)
    source_bytes = torch.empty_like(memory.pages).random_(0, 256)
    target_bytes = torch.empty_like(memory.pages).fill_(1)
    memory.pages.fill_(1)
    command = [sys.executable, __file__, "--serve", str(n_pages), *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        told = bytes.fromhex(owner.stdout.readline())
        endpoint, source = msgspec.msgpack.decode(told, type=tuple[Endpoint, PageSet])
        transports = {name: make_transport(name, memory, "reader", "127.0.0.1") for name in names}
        ids = torch.arange(n_pages)
        ways: dict[str, Callable[[], float]] = {
            "memcpy": lambda: seconds_of(lambda: target_bytes.copy_(source_bytes)),
            "check": lambda: seconds_of(
                lambda: [copy_pages(memory.heads(layer), ids, None, None) for layer in range(cut.n_layers)]
            ),
            "stream": lambda: stream_seconds(cut.total_bytes),
            **{name: lambda name=name: pull_seconds(transports[name], endpoint, source) for name in names},
        }
        for number in range(-1, report.settings["rounds"]):
            figures = {f"{way}_gb_s": cut.total_bytes / run() / 1e9 for way, run in ways.items()}
            if number >= 0:  # the first one touches memory and opens connections
                report.add_round(**figures)
        for transport in transports.values():
            transport.close()
    memory.close()
    summarise(report, names)
    quick = Path("/tmp") / f"{NAME}-quick.json" if flags.quick else None
    report.finish(flags.output or quick)


def summarise(report: Report, names: list[str]) -> None:
    rates = {key: [float(figures[key]) for figures in report.rounds] for key in report.rounds[0]}
    for name in names:
        peer = "memcpy" if name == "shm" else "stream"
        what = "TCP stream" if peer == "stream" else peer
        report.summary.append(
            compare(f"{name} read", "GB/s", rates[f"{name}_gb_s"], what, rates[f"{peer}_gb_s"], TARGET)
        )
    report.summary.append(compare("check values alone", "GB/s", rates["check_gb_s"], "memcpy", rates["memcpy_gb_s"]))


def seconds_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
