"""How many tokens the cache holds.

A token costs its keys and values in every layer and one routing row. The cache gets what `--mem-fraction-static` of the
machine's memory leaves beside the weights, but no more than all running requests can fill at full length: past that, pages
would only be held. The operating system backs pages when they are first written, so an idle cache costs nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
) -> CacheSize:
    """Raises ValueError where the memory share does not hold the weights and one request of full length."""
    room = int(total_bytes * fraction) - weight_bytes
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
