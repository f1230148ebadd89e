"""Joining a group, and what happens when another rank does not come, dies or stalls."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import rank_calls
import torch
from processes import wait_for
from rank_processes import RankProcesses, State

from fastdeploy.config.schema import ParallelConfig
from fastdeploy.distributed import groups
from fastdeploy.errors import EngineStartError

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")
FOUR = ParallelConfig(data=2, tensor=2, expert=True)


def meet_forever(state: State, name: str, begun: Path) -> None:
    """Exchange rows until something goes wrong; the file `begun` is there after the first time."""
    from fastdeploy.distributed.all_to_all.base import ExpertRows, make_all_to_all
    from fastdeploy.layers.moe.gate import Routing

    all_to_all = make_all_to_all(name, state["group"], ExpertRows(4, 1, 8, torch.float32))
    x_tH, routing = torch.ones(1, 8), Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    while True:
        sent = all_to_all.dispatch(x_tH, routing, (1,) * state["group"].where.group_size)
        all_to_all.combine(sent.x_rH, sent)
        begun.touch()


def listening(state: State) -> list[str]:
    """Addresses on which this process listens, as the kernel writes them."""
    inodes = {link for fd in Path("/proc/self/fd").iterdir() if (link := _target(fd)).startswith("socket:")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def test_a_rank_that_does_not_come_is_named() -> None:
    store, host, port = groups.open_store(FOUR, 0)
    waited = []
    with pytest.raises(EngineStartError, match=r"waited 2 s for rank 1 on 127.0.0.1, rank 2 on .*, rank 3 .*--ips"):
        groups.join(FOUR, 0, CPU, host, port, store, patience_s=1.5, on_wait=lambda *n: waited.append(n))
    assert waited == [(1, 4)]


def test_a_store_that_is_not_there_is_named() -> None:
    store, host, port = groups.open_store(FOUR, 0)
    del store
    with pytest.raises(EngineStartError, match=rf"rank 1: cannot reach the first rank of its group at {host}:{port}"):
        groups.join(FOUR, 1, CPU, host, port, patience_s=1.0)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(EngineStartError, match=r"rank 0: cannot listen on 192\.0\.2\.1: .* --ips"):
        groups.open_store(ParallelConfig(tensor=2, hosts=("192.0.2.1",)), 0)


def test_a_lone_rank_needs_no_group() -> None:
    group = groups.join(ParallelConfig(data=3), 1, CPU, "", 0)
    assert group.everyone is group.tensor is group.store is None


def test_only_the_loopback_interface_is_used(ranks: RankProcesses) -> None:
    rank_calls.make_group(ranks, ParallelConfig(data=2, expert=True))
    found = [address for of_rank in ranks.call(listening, [()] * 2) for address in of_rank]
    assert found and set(found) <= {"0100007F"}


@pytest.mark.parametrize("name", ["shm", "gloo"])
def test_a_rank_that_dies_ends_the_others(name: str, tmp_path: Path) -> None:
    mortal = RankProcesses()
    try:
        rank_calls.make_group(mortal, ParallelConfig(data=3, expert=True))
        for i in range(3):
            mortal.send(i, meet_forever, name, tmp_path / str(i))
        wait_for(lambda: len(list(tmp_path.iterdir())) == 3, what="all ranks to exchange rows")
        os.kill(mortal.processes[2].pid or 0, signal.SIGKILL)
        for i in range(2):
            ok, text = mortal.result(i)
            assert not ok and "EngineDeadError" in text
            if name == "shm":
                assert f"rank {i}: rank 2 is gone" in text
    finally:
        mortal.stop()
