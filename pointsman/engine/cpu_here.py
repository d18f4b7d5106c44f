"""The CPU of this machine, measured when it is asked about, in a fraction of a second."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pointsman.engine.device_models import DeviceModel, Figure
from pointsman.engine.memory import memory_bytes
from pointsman.kernels.device import Device
from pointsman.kernels.triton_support import version

READ_BYTES, CACHED_BYTES = 128 << 20, 1 << 20
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # such as 32768K
PRODUCT, PRODUCTS = 64, 16  # so small that the library of products starts no threads, which would wait for each other where others run
SECONDS = 0.1
ROUNDS = 5


def cpu_model() -> DeviceModel:
    """What it reads and multiplies, with all of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    left, out = np.ones((PRODUCTS, PRODUCT, PRODUCT), np.float32), np.empty((PRODUCTS, PRODUCT, PRODUCT), np.float32)
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), cores)

    def read() -> None:
        threads = [threading.Thread(target=part.max) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return DeviceModel(
        name="cpu",
        device=Device(type="cpu", triton=version()),
        memory=Figure(float(memory_bytes()), "what this process may use"),
        read=Figure(READ_BYTES / _seconds(read), "measured now: the largest of many numbers"),
        cache=Figure(float(last_cache_bytes()), "what cores keep nearest to memory"),
        cached_read=Figure(cores * CACHED_BYTES / _seconds(parts[0][: CACHED_BYTES // 4].max), "measured now: of few numbers, by a core"),
        fp8=None,
        plain=Figure(
            cores * 2 * PRODUCTS * PRODUCT**3 / _seconds(lambda: np.matmul(left, left, out=out)), "measured now: float32 products of a core"
        ),
        num_processors=cores,
    )


def last_cache_bytes() -> int:
    """Bytes of the last cache, 0 where the kernel does not tell."""
    text = LAST_CACHE.read_text().strip() if LAST_CACHE.is_file() else "0K"
    return int(text.removesuffix("K")) << 10


def _seconds(work: Callable[[], object]) -> float:
    """The least of as many rounds as there is time for, for what else runs here takes some of them."""
    least, end = math.inf, time.perf_counter() + SECONDS
    for count in itertools.count():
        begin = time.perf_counter()
        if count >= ROUNDS and begin > end:
            break
        work()
        least = min(least, time.perf_counter() - begin)
    return least
