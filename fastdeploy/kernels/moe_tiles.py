"""Which tiles the grouped matmuls of a sparse layer use: the tuned table of a device and shape, or a default.

`tuned/<device>_e<experts>_h<hidden>_m<width>_<dtype>.json` maps token counts to tiles; a step uses the entry of the
smallest count that is not below its own. `fastdeploy.kernels.tune_moe` writes these files. A rank with a part of the
experts takes the table of another number of them: it gets as many rows for each as one GPU with all of them.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fastdeploy.kernels.moe_few import FewTile
from fastdeploy.kernels.moe_many import ManyTile

log = logging.getLogger("fastdeploy.kernels")
FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True, kw_only=True)
class FewPlan:
    """Tiles of a decode step, or with whole-number weights of any.

    `direct`: every pair is a block of its own, and nothing is sorted.
    """

    gate_up: FewTile
    down: FewTile
    direct: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyPlan:
    """Tiles of a prefill step; FP8 has none, its kernels' tiles are fixed."""

    gate_up: ManyTile | None = None
    down: ManyTile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEPlan:
    """One of the two ways to compute a sparse layer."""

    few: FewPlan | None = None
    many: ManyPlan | None = None


@dataclass(frozen=True, slots=True)
class MoETiles:
    """Plans by the largest number of tokens they serve, ascending; the last serves everything above."""

    plans: Mapping[int, MoEPlan]
    n_sms: int

    def plan(self, n_tokens: int) -> MoEPlan:
        """The plan of a step of `n_tokens` rows."""
        return self.plans[next((limit for limit in self.plans if n_tokens <= limit), max(self.plans))]


def _plans(few: Mapping[int, FewPlan], many: ManyPlan) -> Mapping[int, MoEPlan]:
    plans = {limit: MoEPlan(few=plan) for limit, plan in few.items()}
    return MappingProxyType({**plans, ANY_NUMBER: MoEPlan(many=many)})


ANY_NUMBER = 1 << 30
_WIDE = FewTile(bm=16, bn=64, bk=128, stages=3, warps=4)
DEFAULT_PLANS: Mapping[int, MoEPlan] = _plans(
    {
        1: FewPlan(gate_up=_WIDE, down=_WIDE, direct=True),
        128: FewPlan(gate_up=_WIDE, down=_WIDE),
        384: FewPlan(
            gate_up=FewTile(bm=32, bn=64, bk=128, stages=3, warps=4),
            down=FewTile(bm=64, bn=128, bk=64, stages=3, warps=8),
        ),
    },
    ManyPlan(
        gate_up=ManyTile(bm=128, bn=128, bk=64, stages=3, warps=8),
        down=ManyTile(bm=128, bn=256, bk=64, stages=3, warps=8),
    ),
)
_FP8 = FewTile(bm=16, bn=128, bk=128, stages=3, warps=4)
_FP8_TALL = FewTile(bm=32, bn=128, bk=128, stages=3, warps=4)
DEFAULT_FP8_PLANS: Mapping[int, MoEPlan] = _plans(
    {
        1: FewPlan(gate_up=_FP8, down=_FP8, direct=True),
        128: FewPlan(gate_up=_FP8, down=_FP8),
        384: FewPlan(gate_up=_FP8_TALL, down=_FP8_TALL),
    },
    ManyPlan(),
)
# Whole numbers have one kernel, whose tiles grow with the rows of an expert. Not tuned.
_INT_WIDE = {bm: FewTile(bm=bm, bn=64, bk=128, stages=3, warps=8 if bm == 128 else 4) for bm in (16, 32, 64, 128)}
DEFAULT_INT_PLANS: Mapping[int, MoEPlan] = MappingProxyType(
    {
        limit: MoEPlan(few=FewPlan(gate_up=_INT_WIDE[bm], down=_INT_WIDE[bm], direct=limit == 1))
        for limit, bm in {1: 16, 160: 16, 320: 32, 640: 64, ANY_NUMBER: 128}.items()
    }
)
_DEFAULTS: Mapping[torch.dtype, Mapping[int, MoEPlan]] = MappingProxyType(
    {torch.float8_e4m3fn: DEFAULT_FP8_PLANS, torch.int8: DEFAULT_INT_PLANS, torch.uint8: DEFAULT_INT_PLANS}
)


def table_path(device: torch.device, n_experts: int, hidden_size: int, width: int, dtype: torch.dtype) -> Path:
    """Where the tuned table of this device and shape lies."""
    name = torch.cuda.get_device_name(device).replace(" ", "_")
    return FOLDER / f"{name}_e{n_experts}_h{hidden_size}_m{width}_{str(dtype).removeprefix('torch.')}.json"


@functools.cache
def load_tiles(device: torch.device, n_experts: int, hidden_size: int, width: int, dtype: torch.dtype) -> MoETiles:
    """The tuned tiles for weights of `dtype`, or the default ones and one log line that names the file looked for."""
    n_sms = torch.cuda.get_device_properties(device).multi_processor_count
    path = table_path(device, n_experts, hidden_size, width, dtype)
    if not path.is_file():
        others = sorted(FOLDER.glob(path.name.replace(f"_e{n_experts}_", "_e*_")))
        path = others[0] if others else path
    if path.is_file():
        return MoETiles(parse_plans(json.loads(path.read_text())["plans"]), n_sms)
    log.info("no tuned tiles %s: using the defaults; `python -m fastdeploy.kernels.tune_moe` makes them", path.name)
    return MoETiles(_DEFAULTS.get(dtype, DEFAULT_PLANS), n_sms)


def parse_plans(plans: Mapping[str, Mapping[str, Any]]) -> Mapping[int, MoEPlan]:
    """Plans from their JSON form."""
    parsed = {}
    for limit, entry in sorted(plans.items(), key=lambda item: int(item[0])):
        if "few" in entry:
            few = entry["few"]
            tiles = {name: FewTile(**few[name]) for name in ("gate_up", "down")}
            parsed[int(limit)] = MoEPlan(few=FewPlan(**tiles, direct=few["direct"]))
        else:
            many = entry["many"]
            cuts = {name: ManyTile(**many[name]) if many[name] else None for name in ("gate_up", "down")}
            parsed[int(limit)] = MoEPlan(many=ManyPlan(**cuts))
    return MappingProxyType(parsed)


def dump_plans(plans: Mapping[int, MoEPlan]) -> dict[str, Any]:
    """The JSON form of plans."""
    return {str(limit): {k: v for k, v in asdict(plan).items() if v is not None} for limit, plan in plans.items()}
