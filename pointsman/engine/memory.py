"""How many tokens the cache holds.

A token costs its keys and values in every layer and one routing row. The cache gets what `--mem-fraction-static` of the
memory leaves beside the weights, but no more than all running requests can fill at full length: past that, pages
would only be held. On a CPU the operating system backs pages when they are first written, so an idle cache costs nothing. On a GPU
the share is of its memory, and what a step works in must fit as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pointsman.config import EngineConfig
from pointsman.kernels.dtypes import NUM_BYTES
from pointsman.models.architecture import Architecture
from pointsman.models.sharding import Shard

MEM_FRACTION = {"cpu": 0.5, "cuda": 0.9}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class CacheSize:
    """Pages of the cache and what they cost in bytes."""

    num_pages: int
    page_size: int
    bytes_per_token: int

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total


def num_ranks_here(config: EngineConfig, device_type: str) -> int:
    """How many ranks share a device and its memory: on a CPU all that are processes of this machine."""
    parallel = config.parallel
    return parallel.tensor_parallel_size if device_type == "cpu" and parallel.distributed_executor_backend != "ray" else 1


def workspace(architecture: Architecture, max_tokens: int, max_logits: int) -> dict[str, int]:
    """What a step of so many rows may hold at once on a device, beside weights and cache: generously, as nothing is gained by less.

    The widest moments are the experts' (for each choice its hidden state, gate and up, and output; beside them the pair that all tokens
    take) and the head's, whose logits are float32 and may be held by two steps. What CUDA itself takes comes on top.
    """
    choice = 3 * architecture.expert_width + architecture.hidden_size
    pair = 3 * max(architecture.shared_width, architecture.dense_width)
    row = 4 * (architecture.top_k * choice + pair) + 16 * (architecture.hidden_size + architecture.num_heads * architecture.head_dim)
    logits = 3 * 4 * max_logits * architecture.vocab_size
    return {"rows of a step": max_tokens * row, "logits": logits, "graphs and compiled kernels": 1 << 30}


def token_bytes(shard: Shard, kv_dtype: str) -> dict[str, int]:
    """What a rank's cache holds of a token."""
    architecture = shard.architecture
    numbers = 2 * architecture.num_layers * len(shard.kv_heads) * architecture.head_dim
    routes = len(architecture.expert_layers) * architecture.top_k * (1 if architecture.num_experts <= 256 else 2)
    return {"keys and values": numbers * NUM_BYTES[kv_dtype], "routing rows": routes}


def context_length_of(config: EngineConfig, architecture: Architecture) -> int:
    """Most tokens of prompt and answer. Raises ValueError where the model was not made for so many."""
    wanted, most = config.model.context_length, architecture.max_positions
    if wanted is not None and wanted > most:
        raise ValueError(f"context_length is {wanted}; the model was made for at most {most} positions")
    return wanted or most


def kv_dtype_of(config: EngineConfig) -> str:
    """What keys and values are stored as."""
    wanted = config.cache.kv_cache_dtype
    if wanted == "auto":
        wanted = "float32" if config.model.dtype == "float32" else "bfloat16"
    return wanted


def cache_for(
    config: EngineConfig,
    shard: Shard,
    *,
    device_type: str,
    weight_bytes: int,
    total_bytes: int,
    free_bytes: int | None = None,
    planner_bytes: int = 0,
) -> CacheSize:
    """The cache of a rank that holds this part of a model.

    Args:
        planner_bytes: what will be taken of a device's for plans of attention.
        total_bytes: memory of the device, or of the machine.
        free_bytes: what is free of a device's when the weights are there.

    Raises:
        ValueError: it does not hold one request of full length.
    """
    architecture, scheduler = shard.architecture, config.scheduler
    if free_bytes is not None:
        free_bytes -= planner_bytes + sum(workspace(architecture, scheduler.chunked_prefill_size, scheduler.max_running_requests).values())
    fraction = config.cache.mem_fraction_static
    return size_cache(
        bytes_per_token=sum(token_bytes(shard, kv_dtype_of(config)).values()),
        weight_bytes=weight_bytes,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        fraction=MEM_FRACTION[device_type] if fraction is None else fraction,
        page_size=config.cache.page_size,
        context_length=context_length_of(config, architecture),
        max_running=scheduler.max_running_requests,
        max_total_tokens=config.cache.max_total_tokens,
    )


def size_cache(
    *,
    bytes_per_token: int,
    weight_bytes: int,
    total_bytes: int,
    fraction: float,
    page_size: int,
    context_length: int,
    max_running: int,
    max_total_tokens: int | None,
    free_bytes: int | None = None,
) -> CacheSize:
    """The cache that fits.

    Args:
        free_bytes: what is free beside the weights and what steps work in, where that is known.

    Raises:
        ValueError: the memory share does not hold the weights and one request of full length.
    """
    room = int(total_bytes * fraction) - weight_bytes
    if free_bytes is not None:
        room, total_bytes = min(room, free_bytes), min(total_bytes, weight_bytes + free_bytes)
    pages_per_request = -(-context_length // page_size)
    if max_total_tokens is not None:
        num_pages = -(-max_total_tokens // page_size)
        if num_pages * page_size * bytes_per_token > total_bytes - weight_bytes:
            raise ValueError(
                f"max_total_tokens is {max_total_tokens}: {num_pages * page_size * bytes_per_token / 2**30:.2f} GiB of cache beside "
                f"{weight_bytes / 2**30:.2f} GiB of weights do not fit in {total_bytes / 2**30:.2f} GiB"
            )
        return CacheSize(num_pages, page_size, bytes_per_token)
    num_pages = min(max(room, 0) // (page_size * bytes_per_token), pages_per_request * max_running)
    if room <= 0:
        raise ValueError(
            f"mem_fraction_static is {fraction:g}: {weight_bytes / 2**30:.2f} GiB of weights, in all forms that they stand in, do not fit "
            f"in {total_bytes * fraction / 2**30:.2f} GiB"
        )
    if num_pages < pages_per_request:
        raise ValueError(
            f"mem_fraction_static is {fraction:g}: {total_bytes * fraction / 2**30:.2f} GiB hold {weight_bytes / 2**30:.2f} GiB "
            f"of weights and {num_pages * page_size} tokens of cache, less than one request of {context_length} tokens; "
            "raise it, or lower --context-length"
        )
    return CacheSize(num_pages, page_size, bytes_per_token)
