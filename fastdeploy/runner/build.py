"""From a configuration to a runner that is ready: weights, then the other ranks, then pages."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from fastdeploy.config.model_shape import checkpoint_dtype
from fastdeploy.config.schema import EngineConfig
from fastdeploy.distributed import topology
from fastdeploy.distributed.all_to_all.base import ExpertRows, exchange_name, make_all_to_all
from fastdeploy.distributed.collectives import Peers, make_collectives
from fastdeploy.distributed.groups import Group, Meeting
from fastdeploy.distributed.shared_weights import OwnMemory, WeightMemory, weight_memory
from fastdeploy.distributed.topology import Position
from fastdeploy.layers.attention.base import AttentionShape, backend_for, make_attention
from fastdeploy.layers.moe.layer import spreads_shared
from fastdeploy.layers.placement import Placement
from fastdeploy.models.checkpoint import Checkpoint
from fastdeploy.models.decoder import Decoder
from fastdeploy.models.random_weights import RandomWeights
from fastdeploy.models.registry import build_model
from fastdeploy.models.weights import Noted
from fastdeploy.runner.expert_balance import ExpertBalancer
from fastdeploy.runner.kv_memory import choose_n_pages, free_bytes, total_bytes
from fastdeploy.runner.model_runner import ModelRunner
from fastdeploy.transfer.layout import PageLayout
from fastdeploy.transfer.memory import allocate_pages

log = logging.getLogger("fastdeploy.weights")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_N_SHOWN = 5  # names of unused tensors in one warning

Report = Callable[[str, int, int, str], None]  # stage, done, total, unit


@torch.inference_mode()
def build_runner(
    config: EngineConfig,
    report: Report = lambda *_: None,
    *,
    number: int | None = None,
    meeting: Meeting | None = None,
    exchange: str | None = None,
) -> tuple[ModelRunner, dict[str, float]]:
    """The runner of rank `number` (by default the first of its replica), and the seconds that each stage took.

    `meeting` is of the ranks of its group, joined once the weights are there; a rank by itself has none. `exchange`
    names how rows reach experts on other ranks, see `exchange_name`. Raises CheckpointError for unusable weights,
    ConfigError when pages do not fit into memory, EngineStartError when another rank does not come.
    """
    shape, parallel = config.model.shape, config.parallel
    where = topology.position(parallel, parallel.data_rank * parallel.tensor if number is None else number)
    peers = Peers(where)
    dtype, device = getattr(torch, config.model.dtype), torch.device(config.model.device)
    memory = _weight_memory(config, where, meeting)
    redundant = config.eplb.redundant if config.eplb else None
    place = Placement(dtype, device, peers, memory, config.model.quantization, redundant)
    heads = AttentionShape(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads // where.n_tensor,
        n_kv_heads=topology.local_kv_heads(shape.n_kv_heads, where)[1],
        head_dim=shape.head_dim,
        page_tokens=config.cache.page_tokens,
    )
    started = time.monotonic()
    backend = make_attention(backend_for(place.device), heads, place.dtype, place.device)
    model = build_model(shape, backend, place)
    _load(model, config, where, lambda n_done: report("weights", n_done, shape.n_layers, "layers"))
    if place.device.type == "cpu" and config.eplb is None:  # on a GPU counting would be one more kernel in every layer
        model.count_expert_loads()
    loaded, balancer = time.monotonic(), None
    if where.group_size > 1:
        assert meeting is not None, "a rank with others needs a way to join them"
        group = meeting.join()
        _connect(peers, group, model, place, exchange)
        balancer = ExpertBalancer(model.sparse_layers(), group, config.eplb) if config.eplb else None
    joined = time.monotonic()
    # Ranks of one machine share its memory, but each has a GPU of its own.
    on_cpu = place.device.type == "cpu"
    n_sharing = topology.ranks_per_host(parallel) if on_cpu else 1
    n_free, n_total = free_bytes(place.device), total_bytes(place.device)
    n_most = n_total if on_cpu else n_free  # a CPU's page takes memory once it is used
    n_pages = choose_n_pages(config, backend.page_bytes(), n_free // n_sharing, n_total // n_sharing, n_most)
    shared, owner = None, uuid.uuid4().hex
    if config.transfer.role != "mixed":
        shared = allocate_pages(page_layout(config, where, n_pages), place.device, owner, shared=True)
    runner = ModelRunner(config, model, backend, n_pages, memory.borrowed_bytes, shared, owner)
    runner.balancer = balancer
    stages_s = {"weights": loaded - started, "group": joined - loaded, "pages": time.monotonic() - joined}
    if where.group_size == 1:
        del stages_s["group"]
    return runner, {stage: round(seconds, 2) for stage, seconds in stages_s.items()}


def _weight_memory(config: EngineConfig, where: Position, meeting: Meeting | None) -> WeightMemory:
    """A GPU has memory of its own."""
    if config.model.device != "cpu" or meeting is None:
        return OwnMemory()
    return weight_memory(config.parallel, where.number, meeting.store)


def page_layout(config: EngineConfig, where: Position, n_pages: int) -> PageLayout:
    """How the pages of a rank are cut."""
    shape = config.model.shape
    first, n_kv_heads = topology.local_kv_heads(shape.n_kv_heads, where)
    return PageLayout(
        n_layers=shape.n_layers,
        n_pages=n_pages,
        page_tokens=config.cache.page_tokens,
        n_kv_heads=n_kv_heads,
        head_dim=shape.head_dim,
        dtype=config.model.dtype,
        first_kv_head=first,
        total_kv_heads=shape.n_kv_heads,
        tensor_rank=where.tensor_rank,
        tensor_size=where.n_tensor,
    )


def _connect(peers: Peers, group: Group, model: Decoder, place: Placement, exchange: str | None) -> None:
    all_to_all, moe, hidden_size = None, model.shape.moe, model.shape.hidden_size
    if peers.where.spreads_experts and moe is not None:
        slots = model.sparse_layers()[0].slots
        n_places = moe.n_experts if slots is None else len(slots.slots)
        rows = ExpertRows(n_places, moe.n_experts_per_token, hidden_size, place.dtype, spreads_shared(moe, place))
        all_to_all = make_all_to_all(exchange_name(group, exchange), group, rows)
    peers.connect(make_collectives(group), all_to_all)


def _load(model: Decoder, config: EngineConfig, where: Position, on_layer: Callable[[int], None]) -> None:
    if config.model.random_weights:
        dtype: torch.dtype = getattr(torch, checkpoint_dtype(Path(config.model.path)))
        device = torch.device(config.model.device)
        model.load(RandomWeights(config.model.shape.n_layers, config.model.seed, dtype, device), on_layer)
        return
    checkpoint = Checkpoint.open(Path(config.model.path))
    weights = Noted(checkpoint)
    model.load(weights, on_layer)
    # What this rank has of sharded layers tells of the others: all experts have the same tensors.
    experts = {_EXPERT.sub(".experts.*.", name) for name in weights.names}
    unused = [name for name in checkpoint.unused(weights.names) if _EXPERT.sub(".experts.*.", name) not in experts]
    if unused and where.number == 0:
        shown = ", ".join(unused[:_N_SHOWN]) + (", ..." if len(unused) > _N_SHOWN else "")
        log.warning(
            "%s: %d tensors are not used by %s: %s",
            checkpoint.folder,
            len(unused),
            config.model.shape.architecture,
            shown,
        )
