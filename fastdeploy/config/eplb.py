"""`--enable-eplb` and `--eplb-config`: experts that are kept even over the ranks while they serve."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastdeploy.config.args import EngineArgs
from fastdeploy.config.schema import EplbConfig, ModelShape, ParallelConfig
from fastdeploy.distributed.expert_placement import most_redundant

_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "redundant_experts_num": "redundant",
        "rearrange_interval_s": "interval_s",
        "min_gain": "min_gain",
    }
)
# Of the original, which reads weights from files again; here they come from the ranks that hold them.
_NO_EFFECT = ("redundant_expert_async_load_model_shmem_size_gb",)

log = logging.getLogger(__name__)


def resolve_eplb(
    args: EngineArgs, parallel: ParallelConfig, shape: ModelShape | None, problems: list[str]
) -> EplbConfig | None:
    """What the flags say; None without `--enable-eplb` and for a rank by itself. Adds to `problems` what is wrong."""
    if not args.enable_eplb:
        if args.eplb_config is not None:
            problems.append("--eplb-config: only --enable-eplb takes it")
        return None
    if not args.enable_expert_parallel:
        problems.append("--enable-eplb: needs --enable-expert-parallel, which spreads experts over ranks")
        return None
    config = _read(args.eplb_config or {}, problems)
    if parallel.n_ranks == 1:  # the flag may stay in a command that is tried on one rank
        return None
    if shape is not None and shape.moe is not None:
        n_experts, most = shape.moe.n_experts, most_redundant(shape.moe.n_experts, parallel.n_ranks)
        if config.redundant > most:
            problems.append(
                f"--eplb-config: redundant_experts_num = {config.redundant}: must be at most {most}: with so many "
                f"each of {parallel.n_ranks} ranks holds all {n_experts} experts"
            )
    return config


def _read(settings: Mapping[str, Any], problems: list[str]) -> EplbConfig:
    values: dict[str, Any] = {}
    for name, value in settings.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in _NO_EFFECT:
            log.warning("--eplb-config: %s has no effect: weights come from the ranks that hold them", name)
        elif name not in _FIELDS:
            problems.append(f"--eplb-config: {name!r} is none of {', '.join(_FIELDS)}")
        elif name == "redundant_experts_num" and not (isinstance(value, int) and number and value >= 0):
            problems.append(f"--eplb-config: {name} = {value!r}: must be a whole number, at least 0")
        elif not number or value < 0:
            problems.append(f"--eplb-config: {name} = {value!r}: must be a number, at least 0")
        else:
            values[_FIELDS[name]] = value if name == "redundant_experts_num" else float(value)
    return EplbConfig(**values)
