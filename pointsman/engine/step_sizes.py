"""The numbers of rows that steps on a device are padded to, and how large they become. No tensors, and no device is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pointsman.config import EngineConfig
from pointsman.engine.memory import context_length_of
from pointsman.kernels.candidates import StepBounds
from pointsman.models.architecture import Architecture

SMALL_SIZES = (1, 2, 4, 8, 16, 32, 64)
# from the first number on, sizes are so far apart
STRIDES = ((128, 64), (512, 256), (2048, 1024))


def step_sizes(max_tokens: int) -> tuple[int, ...]:
    """The numbers of rows that steps are padded to, up to the most tokens a step has: powers of two, then with growing strides."""
    sizes = list(SMALL_SIZES)
    ends = [first for first, _ in STRIDES[1:]] + [max_tokens]
    for (first, stride), end in zip(STRIDES, ends, strict=True):
        sizes += range(first, end, stride)
    return (*(size for size in sizes if size < max_tokens), max_tokens)


def size_for(num_tokens: int, sizes: Sequence[int]) -> int:
    """The least of the ascending sizes that holds so many rows; more rows than the last are not padded."""
    return next((size for size in sizes if size >= num_tokens), num_tokens)


def bounds_of(config: EngineConfig, architecture: Architecture) -> StepBounds:
    """How large steps become in an engine of this configuration."""
    page_size, scheduler = config.cache.page_size, config.scheduler
    max_pages = math.ceil(context_length_of(config, architecture) / page_size)
    return StepBounds(step_sizes(scheduler.chunked_prefill_size), scheduler.max_running_requests, max_pages, page_size)
