"""What ranks pay for being several, alone: the agreement on a step, and one dispatch and combine.

python benchmarks/dp_exchange.py [RANKS ...]     # prints microseconds for 1, 8, 64 and 512 rows a rank
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.resolve import resolve
from fastdeploy.config.schema import EngineConfig, ModelShape, ParallelConfig
from fastdeploy.wire.channel import new_endpoint, new_keys
from fastdeploy.wire.messages import GroupAddress

N_STEPS = 400
PATIENCE_S = 120.0


def agreement_us(n_ranks: int, model: str | None = None) -> float:
    """Median microseconds from the vote of a core until it has the agreement, when all vote at once."""
    from fastdeploy.demo.model import build_demo_model

    config = resolve(EngineArgs(model=model or str(build_demo_model(form="moe")), device="cpu"))
    config = replace(config, parallel=ParallelConfig(data=n_ranks, expert=True))
    address = GroupAddress(new_endpoint(), *new_keys(), PATIENCE_S)
    return _in_processes(_vote, [(config, address, rank) for rank in range(n_ranks)])


def exchange_us(n_ranks: int, n_rows: int, shape: ModelShape, name: str = "shm") -> float:
    """Median microseconds of one dispatch and one combine of `n_rows` rows a rank."""
    parallel = ParallelConfig(data=n_ranks, expert=True)
    return _in_processes(_exchange, [(parallel, rank, n_rows, shape, name) for rank in range(n_ranks)])


def _in_processes(work: Any, arguments: list[tuple[Any, ...]]) -> float:
    """`work(pipe, *arguments[i])` in process i; the median of the figures they give."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in arguments]
    processes = [
        context.Process(target=work, args=(theirs, *given), daemon=True)
        for (_, theirs), given in zip(pipes, arguments, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        meeting = None
        if work is _exchange:
            meeting = pipes[0][0].recv()
            for ours, _ in pipes:
                ours.send(meeting)
        figures: list[float] = [ours.recv() for ours, _ in pipes]
    finally:
        for process in processes:
            process.join(PATIENCE_S if sys.exc_info()[0] is None else 0)
            process.kill()
    return statistics.median(figures)


def _vote(pipe: Connection, config: EngineConfig, address: GroupAddress, rank: int) -> None:
    import zmq

    from fastdeploy.engine.group import CoreGroup

    group = CoreGroup(replace(config, parallel=replace(config.parallel, data_rank=rank)), address)
    poller = zmq.Poller()
    for socket in group.sockets:
        poller.register(socket, zmq.POLLIN)
    took_us = []
    for _ in range(N_STEPS):
        start_s = time.perf_counter()
        while not group._complete:
            poller.poll(50)
            group.advance()
        group.vote(8, 0, graph_ok=True)
        while group.take_agreement() is None:
            poller.poll(1000)
            group.advance()
        took_us.append((time.perf_counter() - start_s) * 1e6)
    for _ in range(20):  # the hub serves those who are behind
        poller.poll(20)
        group.advance()
    pipe.send(statistics.median(took_us[20:]))


def _exchange(pipe: Connection, parallel: ParallelConfig, rank: int, n_rows: int, shape: ModelShape, name: str) -> None:
    import torch

    from fastdeploy.distributed import groups
    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all
    from fastdeploy.layers.moe.gate import Routing

    torch.set_num_threads(1)
    moe = shape.moe
    assert moe is not None
    store = None
    if rank == 0:
        store, host, port = groups.open_store(parallel, 0)
        pipe.send((host, port))
    host, port = pipe.recv()
    group = groups.join(parallel, rank, torch.device("cpu"), host, port, store, patience_s=PATIENCE_S)
    rows = ExpertRows(moe.n_experts, moe.n_experts_per_token, shape.hidden_size, torch.float32)
    all_to_all = make_all_to_all(name, group, rows)
    x_tH = torch.randn(n_rows, shape.hidden_size)
    expert_tk = torch.rand(n_rows, moe.n_experts).topk(moe.n_experts_per_token).indices
    routing = Routing(expert_tk, torch.rand(n_rows, moe.n_experts_per_token))
    n_rows_g = (n_rows,) * parallel.data
    took_us = []
    for _ in range(N_STEPS):
        start_s = time.perf_counter()
        sent = all_to_all.dispatch(x_tH, routing, n_rows_g)
        all_to_all.combine(sent.x_rH, sent)
        took_us.append((time.perf_counter() - start_s) * 1e6)
    pipe.send(statistics.median(took_us[20:]))


def main() -> None:
    from fastdeploy.config.model_shape import read_model_shape
    from fastdeploy.demo.model import build_demo_model

    model = build_demo_model(form="moe")
    shape = read_model_shape(Path(model))
    for n_ranks in [int(word) for word in sys.argv[1:]] or [2]:
        print(f"{n_ranks} ranks: agreement {agreement_us(n_ranks, str(model)):.0f} us")
        for n_rows in (1, 8, 64, 512):
            shm, gloo = (exchange_us(n_ranks, n_rows, shape, name) for name in ("shm", "gloo"))
            print(f"  {n_rows:4} rows a rank: dispatch and combine {shm:.0f} us by shm, {gloo:.0f} us by gloo")


if __name__ == "__main__":
    main()
