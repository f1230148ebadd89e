"""Bring up everything behind a front end: tokenizer, engine core, client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from fastdeploy.admission.open import admission as opened
from fastdeploy.config.admission import AdmissionConfig
from fastdeploy.config.schema import EngineConfig, ModelConfig
from fastdeploy.errors import ConfigError
from fastdeploy.frontend.coordinator import Coordinator
from fastdeploy.frontend.experts import ExpertDesk
from fastdeploy.frontend.generation import Generator
from fastdeploy.frontend.meeting import group_patience_s
from fastdeploy.frontend.tokenizer import Tokenizer, load_tokenizer
from fastdeploy.observability.metrics import Metrics
from fastdeploy.observability.totals import StatusTotals
from fastdeploy.wire.channel import new_endpoint, new_keys
from fastdeploy.wire.messages import GroupAddress, LoadProgress, Status


@asynccontextmanager
async def running_generator(
    config: EngineConfig,
    metrics: Metrics,
    on_progress: Callable[[LoadProgress], None],
    on_status: Callable[[Status], None] = lambda _: None,
    *,
    group: GroupAddress | None = None,
    restart: bool = False,
    admission: AdmissionConfig | None = None,
) -> AsyncGenerator[Generator, None]:
    """A generator whose engine is up, until the end of the block. Raises the FastDeployError it failed with.

    `group` is where the engine cores of other servers are met; without it, those of this one meet by themselves. With
    `restart` an engine that dies later is replaced. `admission` says where requests wait; None is in this server.
    """
    tokenizer = await asyncio.to_thread(tokenizer_of, config.model)
    config = with_tokenizer_stops(config, tokenizer)
    if group is None and config.parallel.shares_experts:
        if len(config.parallel.serves) < config.parallel.data:
            raise ConfigError(
                f"data-parallel rank {config.parallel.data_rank} alone cannot meet the other "
                f"{config.parallel.data - 1}: start all with multi_api_server, or unset FD_ENABLE_MULTI_API_SERVER and "
                "leave --local-data-parallel-id out to serve all ranks here"
            )
        group = GroupAddress(new_endpoint(), *new_keys(), group_patience_s())
    totals = StatusTotals()

    def take_status(statuses: dict[int, Status]) -> None:
        whole = totals.add_up(statuses)
        metrics.update(whole)
        metrics.update_ranks(statuses, coordinator.balance_ratio())
        on_status(whole)

    admission = admission or AdmissionConfig()
    async with AsyncExitStack() as stack:
        # Before the engines, for which a model is loaded: a Redis that is not there shows at once.
        coordinator = Coordinator(config, group, take_status, restart=restart, pinned=admission.name == "dp")
        stack.push_async_callback(coordinator.close)
        make_room = await stack.enter_async_context(opened(admission, config, metrics.registry))
        ready = await coordinator.start(on_progress)
        metrics.configure(config, ready.n_pages)
        room = make_room(coordinator, ready.control_ports)
        experts = ExpertDesk(coordinator) if config.eplb is not None else None
        yield Generator(config, tokenizer, metrics, room, ready, dp_ranks(admission, config), experts)


def dp_ranks(admission: AdmissionConfig, config: EngineConfig) -> tuple[int, ...]:
    """The data-parallel ranks that a request may name."""
    return config.parallel.serves if admission.name == "dp" else ()


def tokenizer_of(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model; of bytes for a synthetic one without a folder. Raises CheckpointError."""
    path = model.tokenizer_path or model.path
    if not path and model.synthetic is not None:
        from fastdeploy.frontend.byte_tokenizer import byte_tokenizer

        return byte_tokenizer()
    return load_tokenizer(path)


def with_tokenizer_stops(config: EngineConfig, tokenizer: Tokenizer) -> EngineConfig:
    """The ends of text that only the tokenizer's files know are stops too."""
    known = (*config.model.eos_token_ids, *tokenizer.eos_token_ids)
    ids = tuple(dict.fromkeys(i for i in known if 0 <= i < config.model.shape.vocab_size))
    return replace(config, model=replace(config.model, eos_token_ids=ids))
