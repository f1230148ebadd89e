"""The socket between an engine core and a rank: the core never waits for a rank that computes."""

from pathlib import Path

import pytest
from processes import Process

pytestmark = pytest.mark.timeout(60)

# A rank that asks for nothing while its core sends a plan with four million prompt tokens, and asks then.
SCRIPT = """
import os, socket
from multiprocessing.connection import Connection
import msgspec
from fastdeploy.executor.worker import CoreLink
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import SlotStart, StepPlan

core, rank = socket.socketpair()
link = CoreLink(rank.detach())
start = SlotStart(0, list(range(4_000_000)), 1, 0, [], SamplingParams())
connection = Connection(core.detach())
connection.send_bytes(msgspec.msgpack.encode(StepPlan(0, [start], [0], [1], [True], [[]])))
print("sent", flush=True)
plan = link.receive()
print("received", len(plan.starts[0].token_ids), flush=True)
os._exit(0)
"""


def test_a_plan_of_any_size_is_taken_at_once(tmp_path: Path) -> None:
    process = Process(["-c", SCRIPT], tmp_path / "run")
    try:
        assert process.end(40) == 0, process.console
    finally:
        process.kill()
    assert process.console.split() == ["sent", "received", "4000000"]
