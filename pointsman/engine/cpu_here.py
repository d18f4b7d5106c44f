"""The CPU of this machine, measured when it is asked about, in a fraction of a second."""

from __future__ import annotations

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
PRODUCT = 768
ROUNDS = 6


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
    """The least of some rounds."""
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)
