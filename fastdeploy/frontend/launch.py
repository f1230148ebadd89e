"""Bring up everything behind a front end: tokenizer, engine core, client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from fastdeploy.config.schema import EngineConfig
from fastdeploy.errors import EngineStartError
from fastdeploy.frontend.client import EngineClient, EngineProcess
from fastdeploy.frontend.generation import Generator
from fastdeploy.frontend.tokenizer import Tokenizer, load_tokenizer
from fastdeploy.observability.metrics import Metrics
from fastdeploy.wire.messages import LoadProgress, Status


@asynccontextmanager
async def running_generator(
    config: EngineConfig,
    metrics: Metrics,
    on_progress: Callable[[LoadProgress], None],
    on_status: Callable[[Status], None] = lambda _: None,
) -> AsyncGenerator[Generator, None]:
    """A generator whose engine is up, until the end of the block. Raises the FastDeployError it failed with."""
    tokenizer = await asyncio.to_thread(load_tokenizer, config.model.tokenizer_path or config.model.path)
    config = with_tokenizer_stops(config, tokenizer)

    def take_status(status: Status) -> None:
        metrics.update(status)
        on_status(status)

    try:
        engine = EngineProcess(config)
    except OSError as error:
        raise EngineStartError(f"could not start the engine core: {error}") from error
    client = EngineClient(engine, config.stall_limit_s, take_status)
    try:
        ready = await client.connect(on_progress)
        metrics.configure(config, ready.n_pages)
        yield Generator(config, tokenizer, metrics, client, ready)
    finally:
        await client.close()


def with_tokenizer_stops(config: EngineConfig, tokenizer: Tokenizer) -> EngineConfig:
    """The ends of text that only the tokenizer's files know are stops too."""
    known = (*config.model.eos_token_ids, *tokenizer.eos_token_ids)
    ids = tuple(dict.fromkeys(i for i in known if 0 <= i < config.model.shape.vocab_size))
    return replace(config, model=replace(config.model, eos_token_ids=ids))
