"""From a configuration to a runner that is ready: weights, then pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastdeploy.config.schema import EngineConfig
from fastdeploy.layers.attention.base import AttentionShape, make_attention
from fastdeploy.layers.placement import Placement
from fastdeploy.models.checkpoint import Checkpoint
from fastdeploy.models.decoder import Decoder
from fastdeploy.models.registry import build_model
from fastdeploy.models.weights import Noted, RandomWeights
from fastdeploy.runner.kv_memory import choose_n_pages, free_bytes, total_bytes
from fastdeploy.runner.model_runner import ModelRunner

log = logging.getLogger("fastdeploy.weights")
_N_SHOWN = 5  # names of unused tensors in one warning

Report = Callable[[str, int, int, str], None]  # stage, done, total, unit


@torch.inference_mode()
def build_runner(config: EngineConfig, report: Report = lambda *_: None) -> tuple[ModelRunner, dict[str, float]]:
    """The runner of one rank, and the seconds that each stage took.

    Raises CheckpointError for unusable weights and ConfigError when pages do not fit into memory.
    """
    shape = config.model.shape
    place = Placement(getattr(torch, config.model.dtype), torch.device(config.model.device))
    heads = AttentionShape(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        page_tokens=config.cache.page_tokens,
    )
    started = time.monotonic()
    backend = make_attention("torch", heads, place.dtype, place.device)
    model = build_model(shape, backend, place)
    _load(model, config, lambda n_done: report("weights", n_done, shape.n_layers, "layers"))
    loaded = time.monotonic()
    n_free, n_total = free_bytes(place.device), total_bytes(place.device)
    n_pages = choose_n_pages(config, backend.page_bytes(), n_free, n_total)
    runner = ModelRunner(config, model, backend, n_pages)
    return runner, {"weights": round(loaded - started, 2), "pages": round(time.monotonic() - loaded, 2)}


def _load(model: Decoder, config: EngineConfig, on_layer: Callable[[int], None]) -> None:
    if config.model.random_weights:
        model.load(RandomWeights(config.model.shape.n_layers, config.model.seed), on_layer)
        return
    checkpoint = Checkpoint.open(Path(config.model.path))
    weights = Noted(checkpoint)
    model.load(weights, on_layer)
    unused = checkpoint.unused(weights.names)
    if unused:
        shown = ", ".join(unused[:_N_SHOWN]) + (", ..." if len(unused) > _N_SHOWN else "")
        log.warning(
            "%s: %d tensors are not used by %s: %s",
            checkpoint.folder,
            len(unused),
            config.model.shape.architecture,
            shown,
        )
