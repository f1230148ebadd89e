"""`python -m fastdeploy.entrypoints.openai.multi_api_server`: one api_server per data parallel rank, kept alive."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from fastdeploy.config.resolve import log_dir
from fastdeploy.entrypoints.supervise.args import LaunchArgs, parse_command_line
from fastdeploy.errors import ConfigError, FastDeployError
from fastdeploy.observability.logs import close_logging, setup_logging

LOGGER = logging.getLogger("fastdeploy.multi_api_server")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the servers until it is told to stop.

    Returns 0 after an orderly end, 2 for wrong flags or a busy port, 1 when a server does not start or, with
    `--restart never`, dies, and 130 when a second signal cut the end short.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        launch, server_args = parse_command_line(args)
        return _run(launch, server_args, os.environ)
    except FastDeployError as exc:
        for line in str(exc).splitlines():
            print(f"fastdeploy: error: {line}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _run(launch: LaunchArgs, server_args: Sequence[str], environ: Mapping[str, str]) -> int:
    """Raises `FastDeployError`."""
    from fastdeploy.entrypoints.supervise.plan import make_plan
    from fastdeploy.entrypoints.supervise.report import StartReport
    from fastdeploy.entrypoints.supervise.supervisor import Supervisor

    setup_logging(log_dir(environ), "multi_api_server", environ=environ)
    try:
        LOGGER.info("%s", launch)
        plan = make_plan(launch, server_args, environ)
        return 0 if asyncio.run(Supervisor(plan, StartReport(len(plan.servers))).run()) else 130
    finally:
        close_logging()


if __name__ == "__main__":
    sys.exit(main())
