"""multi_api_server with one server for each data-parallel rank, as a real process tree, and a router in front."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from machine import process_tree
from synthetic_fleet import HOST, Program, Router

RANK_MODULE = "fastdeploy.executor.worker"
_ROW = re.compile(r"(\d+) +(http://\S+) +(http://\S+)/metrics +(\d+) +/")


@dataclass(frozen=True, slots=True)
class Member:
    """One server of the group."""

    data_rank: int
    url: str
    metrics_url: str
    pid: int

    def rank_pids(self) -> list[int]:
        """Processes that compute, in the order of their start."""
        return sorted(pid for pid in process_tree(self.pid) if RANK_MODULE in _command(pid))


class ServerGroup:
    """The servers, ready when the `with` block begins, registered with `router` if there is to be one."""

    def __init__(
        self, folder: Path, n_servers: int, flags: Sequence[str], *, with_router: bool = False, start_s: float = 600.0
    ) -> None:
        """`flags`: of each server. `start_s`: how long they may take. Raises RuntimeError when they do not start."""
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.router: Router | None = None
            if with_router:
                self.router = Router(folder / "router", {"policy": "process_tokens"})
                stack.callback(self.router.stop)
                flags = [*flags, "--router", self.router.address]
            ports = ",".join(["0"] * n_servers)
            command = ["--num-servers", str(n_servers), "--ports", ports, "--metrics-ports", ports]
            self.servers = Program(
                "fastdeploy.entrypoints.openai.multi_api_server",
                [*command, "--args", "--host", HOST, *flags],
                folder / "servers",
            )
            stack.callback(self.servers.stop)
            ready = r"(?:the server is|all \d+ servers are) ready after ([\d.]+) s"
            self.start_s = float(self.servers.wait_for(ready, start_s))
            self.servers.wait_for(rf"\n.*\b({n_servers - 1}) +http://")
            rows = _ROW.findall(self.servers.console)
            self.members = [Member(int(rank), url, metrics, int(pid)) for rank, url, metrics, pid in rows]
            if len(self.members) != n_servers:
                raise RuntimeError(f"{len(self.members)} of {n_servers} servers in the table:\n{self.servers.console}")
            self._stack = stack.pop_all()

    def __enter__(self) -> ServerGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
