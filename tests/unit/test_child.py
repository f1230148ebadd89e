"""A child that is stopped before it runs a line of its own ends with its parent all the same."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(60)

PARENT = """
import os, signal, sys
from pathlib import Path
from fastdeploy.wire.child import Child
from fastdeploy.wire.messages import Stop
child = Child("child", "fastdeploy.executor.synthetic", Stop(), Path(sys.argv[1]))
os.kill(child.process.pid, signal.SIGSTOP)
print(child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stopped_child_ends_with_its_parent(tmp_path: Path) -> None:
    started = time.monotonic()
    parent = subprocess.run([sys.executable, "-c", PARENT, str(tmp_path / "output")], capture_output=True, text=True)
    assert parent.returncode == -9, parent.stderr
    child = int(parent.stdout)
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < started + 50, "a stopped child outlived its parent"
        time.sleep(0.05)
