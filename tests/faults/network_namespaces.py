"""Two machines for tests: network namespaces of this one with a cable between them."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

Result = TypeVar("Result")

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Machine:
    """One end of the cable."""

    namespace: str
    device: str
    address: str

    def command(self, args: Sequence[str]) -> list[str]:
        """Arguments for a Python that becomes `python ARGS` on this machine, in the same process."""
        start = f"import os; os.execvp('ip', {['ip', 'netns', 'exec', self.namespace, sys.executable, *args]!r})"
        return ["-c", start]

    def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function whose new sockets are on this machine."""
        found: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self.enter()
                found.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)  # a namespace belongs to a thread
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return found[0]

    def plug(self, *, connected: bool) -> None:
        """Pull the cable out here, or put it back."""
        ip("-n", self.namespace, "link", "set", self.device, "up" if connected else "down")

    def enter(self) -> None:
        """This thread, and what it starts from now on, is on this machine."""
        fd = os.open(Path("/run/netns") / self.namespace, os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.setns(fd, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")
        finally:
            os.close(fd)


def ip(*args: str) -> None:
    """Runs the command `ip`; raises when it fails."""
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=30)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two namespaces that reach each other and nothing else. Skips the test where they cannot be made."""
    with ExitStack() as made:
        try:
            machines = connected(made)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", "") or error
            pytest.skip(f"needs root and the command ip (iproute2) to make network namespaces: {detail}")
        yield machines


def connected(made: ExitStack) -> tuple[Machine, Machine]:
    """The same, gone when `made` closes. Raises OSError or CalledProcessError where they cannot be made."""
    number = os.getpid()
    first, second = (Machine(f"fd{number}{c}", f"fd{number}{c}", f"10.77.0.{i}") for i, c in enumerate("ab", 1))
    for machine in (first, second):
        ip("netns", "add", machine.namespace)
        made.callback(ip, "netns", "del", machine.namespace)
        ip("-n", machine.namespace, "link", "set", "lo", "up")
    peer = ("type", "veth", "peer", "name", second.device, "netns", second.namespace)
    ip("-n", first.namespace, "link", "add", first.device, *peer)
    for machine in (first, second):
        ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", machine.device)
        machine.plug(connected=True)
    return first, second
