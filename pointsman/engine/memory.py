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

from pointsman.models.architecture import Architecture

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


def workspace_bytes(architecture: Architecture, max_tokens: int, max_logits: int) -> int:
    """What a step of so many rows may hold at once on a device, beside weights and cache: generously, as nothing is gained by less.

    The widest moments are the experts' (for each choice its hidden state, gate and up, and output; beside them the pair that all tokens
    take) and the head's, whose logits are float32 and may be held by two steps. What CUDA itself, its graphs and compiled kernels take
    comes on top.
    """
    choice = 3 * architecture.expert_width + architecture.hidden_size
    pair = 3 * max(architecture.shared_width, architecture.dense_width)
    row = 4 * (architecture.top_k * choice + pair) + 16 * (architecture.hidden_size + architecture.num_heads * architecture.head_dim)
    return max_tokens * row + 3 * 4 * max_logits * architecture.vocab_size + (1 << 30)


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
    if num_pages < pages_per_request:
        raise ValueError(
            f"mem_fraction_static is {fraction:g}: {total_bytes * fraction / 2**30:.2f} GiB hold {weight_bytes / 2**30:.2f} GiB "
            f"of weights and {num_pages * page_size} tokens of cache, less than one request of {context_length} tokens; "
            "raise it, or lower --context-length"
        )
    return CacheSize(num_pages, page_size, bytes_per_token)
