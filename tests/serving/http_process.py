"""A process that serves a fake engine with the real `HttpServer`: `python http_process.py '{"step_s": 0.1}'`.

Keys are those of `FakeGenerator`, besides `start_s` (seconds the engine takes to come up), `start_error` (text of the
error it fails with), `drain_s`, and `n_tokens` of every answer. Prints the address as its first line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from fake_engine import FakeGenerator, make_state

from fastdeploy.entrypoints.openai.app import create_app
from fastdeploy.entrypoints.openai.server import HttpServer, address_of, bind
from fastdeploy.errors import EngineStartError, FastDeployError


async def serve(options: dict[str, Any]) -> bool:
    start_s, start_error = options.pop("start_s", 0.0), options.pop("start_error", None)
    drain_s, n_tokens = options.pop("drain_s", 0), options.pop("n_tokens", 5)
    generator = FakeGenerator(script=lambda ids, i: [65] * n_tokens, **options)
    state = make_state(generator, generator=None, stage="starting: fake")
    sock = bind("127.0.0.1", 0, "--port")

    @asynccontextmanager
    async def engine() -> AsyncGenerator[FakeGenerator, None]:
        await asyncio.sleep(start_s)
        if start_error is not None:
            raise EngineStartError(start_error)
        yield generator
        print("engine stopped", flush=True)

    print(address_of(sock), flush=True)
    server = HttpServer(state, [(create_app(state), sock)], drain_s)
    return await server.run(engine, lambda _: print("up", flush=True))


def main() -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return 0 if runner.run(serve(json.loads(sys.argv[1]))) else 130
    except FastDeployError as exc:
        print(f"fastdeploy: error: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
