"""Memory of a CUDA device that goes back whole.

torch's allocator cuts large segments among whoever asks, and a segment goes back to the device only when all of it is free. So what is
to be given back as one (the cache, the weights) is allocated from a pool of its own, whose segments nothing else shares.

While a thread allocates so, no thread's allocation that fails can have what is cached elsewhere freed for it. So that is freed
before, and the block should be as long as allocating takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """What this thread allocates on the device meanwhile shares no segment with anything else. On a CPU nothing is changed.

    The pool is let go at the end; its tensors keep their memory, and `torch.cuda.empty_cache` gives back what they no longer hold.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
            yield
