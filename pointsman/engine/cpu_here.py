"""The CPU of this machine, measured when it is asked about, in a fraction of a second."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable

import numpy as np

from pointsman.engine.device_models import DeviceModel, Figure
from pointsman.engine.memory import memory_bytes
from pointsman.kernels.device import Device
from pointsman.kernels.triton_support import version

READ_BYTES = 128 << 20
PRODUCT = 256
SECONDS = 0.2
ROUNDS = 5


def cpu_model() -> DeviceModel:
    """What it reads and multiplies, with all of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    left, right = np.ones((PRODUCT, PRODUCT), np.float32), np.ones((PRODUCT, PRODUCT), np.float32)
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), cores)

    def read() -> None:
        threads = [threading.Thread(target=part.sum) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return DeviceModel(
        name="cpu",
        device=Device(type="cpu", triton=version()),
        memory=Figure(float(memory_bytes()), "what this process may use"),
        read=Figure(READ_BYTES / _seconds(read), "measured now: a sum over memory"),
        fp8=None,
        plain=Figure(2 * PRODUCT**3 / _seconds(lambda: np.matmul(left, right)), "measured now: a float32 product"),
        num_processors=cores,
    )


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
