"""What would make a model fit that does not: more ranks, a smaller type of cache, less context, another GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pointsman.config import EngineConfig
from pointsman.engine.device_models import MODELS, DeviceModel
from pointsman.engine.plan import Plan, plan_on
from pointsman.models.architecture import Architecture

RANKS = (1, 2, 4, 8, 16)
SMALL_CACHE = "fp8_e4m3"


def remedies(plan: Plan, here: DeviceModel) -> list[str]:
    """Flags to change or add, each line enough by itself; nothing where memory is not what is lacking."""
    if plan.cache is not None:
        return []
    found = []
    if (length := _context_that_fits(plan, here)) is not None:
        found.append(f"--context-length {length}")
    found += _fewest(plan.config, plan.shard.architecture, here)
    for name, model in MODELS.items():
        if name != here.name:
            found += [f"--device {name} {flags}".rstrip() for flags in _fewest(plan.config, plan.shard.architecture, model)]
    return found


def _context_that_fits(plan: Plan, here: DeviceModel) -> int | None:
    """The longest context in whole pages that the memory holds one request of."""
    page_size = plan.config.cache.page_size
    low, high = 0, plan.context_length // page_size
    while low < high:
        middle = (low + high + 1) // 2
        model = dataclasses.replace(plan.config.model, context_length=middle * page_size)
        fits = _serves(dataclasses.replace(plan.config, model=model), plan.shard.architecture, here)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * page_size or None


def _fewest(config: EngineConfig, architecture: Architecture, model: DeviceModel) -> list[str]:
    """The flags with which the fewest of these devices serve; and with a smaller cache, where fewer do so."""
    found: list[str] = []
    fewest = max(RANKS) + 1
    for kind in dict.fromkeys((config.cache.kv_cache_dtype, SMALL_CACHE)):
        cache = dataclasses.replace(config.cache, kv_cache_dtype=kind)
        for tp, ep in _layouts(model):
            parallel = dataclasses.replace(config.parallel, tensor_parallel_size=tp, expert_parallel_size=ep)
            if tp < fewest and _serves(dataclasses.replace(config, cache=cache, parallel=parallel), architecture, model):
                flags = [f"--tp {tp}", *([f"--ep {ep}"] if ep > 1 else [])]
                flags += [f"--kv-cache-dtype {kind}"] if kind != config.cache.kv_cache_dtype else []
                found.append(" ".join(flags))
                fewest = tp
    return found


def _layouts(model: DeviceModel) -> Iterator[tuple[int, int]]:
    """From few ranks to many, experts split in their width or else whole; several ranks want a link between them."""
    for tp in RANKS if model.link is not None else (1,):
        yield tp, 1
        if tp > 1:
            yield tp, tp


def _serves(config: EngineConfig, architecture: Architecture, model: DeviceModel) -> bool:
    try:
        return not plan_on(config, architecture, model).refusals
    except ValueError:
        return False
