"""`python -m fastdeploy.entrypoints.openai.api_server`: one front end with its engine."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastdeploy.config.admission import resolve_admission
from fastdeploy.config.args import EngineArgs, ServerArgs
from fastdeploy.config.flags import build_parser
from fastdeploy.config.parallel import served_devices
from fastdeploy.config.resolve import log_dir, resolve_all, resolve_server
from fastdeploy.config.schema import EngineConfig
from fastdeploy.entrypoints.supervise.announce import Announce, Bound, Up, tell_nobody
from fastdeploy.errors import ConfigError, FastDeployError
from fastdeploy.observability.logs import CONSOLE, close_logging, setup_logging

if TYPE_CHECKING:
    from fastdeploy.entrypoints.openai.state import ServerState
    from fastdeploy.frontend.generation import Generator
    from fastdeploy.wire.messages import GroupAddress, LoadProgress, Status

PROGRAM = "python -m fastdeploy.entrypoints.openai.api_server"
LOGGER = logging.getLogger("fastdeploy.api_server")
EXAMPLE = f"""Example:
  {PROGRAM} --model DIR --port 8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "Hello"}}'"""


def main(argv: Sequence[str] | None = None, announce: Announce = tell_nobody) -> int:
    """Serves until it is told to stop; `announce` is called when the ports are bound and when the engine is up.

    Returns 0 after an orderly end, 2 for wrong flags or a busy port, 1 when the engine does not start or dies,
    130 when a second signal cut the end short.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(PROGRAM, ServerArgs, EngineArgs, epilog=EXAMPLE)
        flags = parser.parse_flags(args)
        return _start(ServerArgs.from_namespace(flags), EngineArgs.from_namespace(flags), os.environ, announce)
    except FastDeployError as exc:
        for line in str(exc).splitlines():
            print(f"fastdeploy: error: {line}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _start(server: ServerArgs, engine: EngineArgs, environ: MutableMapping[str, str], announce: Announce) -> int:
    """Binds first: a busy port is reported before a model is looked at. Raises `FastDeployError`."""
    from fastdeploy.entrypoints.openai.server import address_of, bind
    from fastdeploy.frontend.meeting import group_address

    server = resolve_server(server, environ)
    with ExitStack() as stack:
        sockets = [stack.enter_context(bind(server.host, server.port, "--port"))]
        if not _one_port(server):
            assert server.metrics_port is not None
            sockets.append(stack.enter_context(bind(server.host, server.metrics_port, "--metrics-port")))
        ports = [sock.getsockname()[1] for sock in sockets]
        announce(Bound(address_of(sockets[0]), address_of(sockets[-1]), ports[0], ports[-1]))
        setup_logging(log_dir(environ), "api_server", environ=environ)
        stack.callback(close_logging)
        server, config = resolve_all(server, engine, environ)
        group = group_address(engine, environ)
        LOGGER.info("flags: %s", _shown_flags(server, engine))
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            in_order = runner.run(_serve(server, engine, config, group, sockets, environ, announce))
    return 0 if in_order else 130


async def _serve(
    server: ServerArgs,
    engine: EngineArgs,
    config: EngineConfig,
    group: GroupAddress | None,
    sockets: Sequence[socket.socket],
    environ: Mapping[str, str],
    announce: Announce,
) -> bool:
    """Runs the server on bound sockets. Raises `FastDeployError`."""
    from fastdeploy.entrypoints.openai.app import create_app, create_metrics_app
    from fastdeploy.entrypoints.openai.server import HttpServer, address_of
    from fastdeploy.frontend.chat_template import ChatTemplate
    from fastdeploy.frontend.launch import running_generator, tokenizer_of
    from fastdeploy.observability.startup import StartupReport, Throughput
    from fastdeploy.router.registration import keep_registered, router_addresses

    routers = router_addresses(engine.router) if engine.router else ()
    registration: list[asyncio.Task[None]] = []
    state = make_state(server, engine, config, environ)
    admission = resolve_admission(engine)
    report, throughput = StartupReport(), Throughput()
    console = logging.getLogger(CONSOLE)

    def on_progress(progress: LoadProgress) -> None:
        done = f" {progress.done} of {progress.total} {progress.unit}" if progress.total else ""
        state.stage = f"starting: {progress.stage}{done}"
        report.on_progress(progress)

    def on_status(status: Status) -> None:
        line = throughput.update(status, time.monotonic())
        if line is not None:
            console.info(line)

    @asynccontextmanager
    async def engine_context() -> AsyncGenerator[Generator, None]:
        if engine.chat_template is not None:  # a mistake in it shows before minutes of loading, not after
            tokenizer = await asyncio.to_thread(tokenizer_of, config.model)
            state.chat_template = ChatTemplate(tokenizer, engine.chat_template)
        restart = server.restart == "on-failure" or (server.restart == "auto" and config.parallel.data > 1)
        async with running_generator(
            config, state.metrics, on_progress, on_status, group=group, restart=restart, admission=admission
        ) as generator:
            state.chat_template = state.chat_template or ChatTemplate(generator.tokenizer)
            yield generator

    def on_up(generator: Generator) -> None:
        report.on_ready(config, generator.ready, address_of(sockets[0]))
        announce(Up())
        if generator.ready.control_ports:
            ports_shown = ",".join(map(str, generator.ready.control_ports))
            console.info(
                "%s server: other servers reach it at %s:%s", config.transfer.role, config.transfer.host, ports_shown
            )
        if routers:
            host, port = sockets[0].getsockname()[:2]
            metrics_port = sockets[-1].getsockname()[1]
            transfer, ports = config.transfer, generator.ready.control_ports
            work = keep_registered(
                routers,
                host,
                port,
                metrics_port,
                lambda: state.health() is None,
                role=transfer.role,
                tp_size=config.parallel.tensor,
                device_ids=served_devices(config.parallel, os.environ) if config.model.device == "cuda" else (),
                connector_port=ports[0] if ports else None,
                transfer_protocol=transfer.protocols if ports else (),
                rdma_ports=transfer.rank_ports,
            )
            registration.append(asyncio.create_task(work))

    apps = [create_app(state)] + [create_metrics_app(state) for _ in sockets[1:]]
    http = HttpServer(state, list(zip(apps, sockets, strict=True)), server.timeout_graceful_shutdown)
    try:
        return await http.run(engine_context, on_up)
    finally:
        for task in registration:
            task.cancel()
            await asyncio.wait([task])
        report.close()


def make_state(server: ServerArgs, engine: EngineArgs, config: EngineConfig, environ: Mapping[str, str]) -> ServerState:
    """What the flags say about the HTTP side."""
    from fastdeploy.entrypoints.openai.state import ServerState, Slots
    from fastdeploy.observability.metrics import Metrics

    return ServerState(
        config=config,
        metrics=Metrics(),
        slots=Slots(server.max_concurrency),
        verify_model=engine.served_model_name is not None,
        api_keys=server.api_key,
        max_waiting_s=server.max_waiting_time if server.max_waiting_time > 0 else None,
        silence_s=server.timeout or None,
        serves_metrics=_one_port(server),
        environment=environ,
    )


def _one_port(server: ServerArgs) -> bool:
    """Whether metrics are served on --port; two free ports are two ports."""
    return server.metrics_port is None or server.metrics_port == server.port != 0


def _shown_flags(server: ServerArgs, engine: EngineArgs) -> str:
    """The flags that differ from their defaults, for the log; keys are counted, not shown."""
    shown = []
    for args in (server, engine):
        defaults = type(args)()
        for name in args.__dataclass_fields__:
            value = getattr(args, name)
            if value != getattr(defaults, name):
                hidden = f"({len(value)} hidden)" if name == "api_key" else "(hidden)" if "password" in name else None
                shown.append(f"--{name.replace('_', '-')}={hidden or value}")
    return " ".join(shown) or "all at their defaults"


if __name__ == "__main__":
    sys.exit(main())
