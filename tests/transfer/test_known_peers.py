"""A reader lets ranks go that it has not read for a while, and with them memory of those that have died."""

import os
import signal
from pathlib import Path

import pytest
from owner import Owner
from test_transports import LAYOUT, Reader

from fastdeploy.executor.pulls import KnownPeers
from fastdeploy.transfer.machine import machine_id

pytestmark = pytest.mark.timeout(120)


def _mapped_bytes() -> int:
    """Of page memory of others, in this process."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:" in line and " r--s " in line:
            begin, end = line.split()[0].split("-")
            found += int(end, 16) - int(begin, 16)
    return found


def test_memory_of_a_dead_owner_is_let_go() -> None:
    owner, reader, known = Owner(LAYOUT, ["shm"], owner="there"), Reader("shm"), KnownPeers()
    assert owner.endpoint.machine == machine_id()
    try:
        before = _mapped_bytes()
        known.connect(reader.transport, owner.endpoint, 0.0)
        mapped = _mapped_bytes()
        assert mapped >= before + LAYOUT.total_bytes
        os.kill(owner.process.pid, signal.SIGKILL)
        owner.process.wait()
        known.let_go(59.0, ())
        known.let_go(61.0, {owner.endpoint.owner})
        assert _mapped_bytes() == mapped, "used lately, or being read"
        known.let_go(61.0, ())
        assert _mapped_bytes() == before
        known.let_go(99.0, ())
    finally:
        reader.close()
        owner.close()
