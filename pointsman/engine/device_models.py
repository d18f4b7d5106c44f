"""Devices by their names, as data: what a choice asks of them, and the rates that bound a step.

A rate is what a kernel that does nothing else reaches, where that was measured, else the vendor's figure; each says which. Of a CPU the
machine at hand is measured, in a fraction of a second. Dense rates; a pair of GPUs is joined by NVLink.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pointsman.engine.memory import memory_bytes
from pointsman.kernels.device import Device
from pointsman.kernels.triton_support import OLDEST, describe

READ_BYTES = 128 << 20
PRODUCT = 768
ROUNDS = 6


class Figure(NamedTuple):
    """A number in SI units and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """One device, whether or not it is here.

    Attributes:
        name: as `pointsman explain --device` has it.
        memory: bytes.
        read: bytes a second from memory.
        fp8, plain: operations a second of products, in FP8 and in bfloat16 (float32 on a CPU); None where there is no such product.
        num_processors: multiprocessors of a GPU, cores of a CPU.
        link: bytes a second to other devices, one way; None where there are none.
        reduce_seconds: the shortest sum over devices.
    """

    name: str
    device: Device
    memory: Figure
    read: Figure
    fp8: Figure | None
    plain: Figure
    num_processors: int
    link: Figure | None = None
    reduce_seconds: Figure | None = None


_VENDOR = "vendor"
_TORCH = "as torch reports it"
_NVLINK4 = Figure(397e9, "copy between two H200, measured 2026-11; vendor 450e9")
_NVLINK5 = Figure(900e9, _VENDOR)
_REDUCE = Figure(6e-6, "estimate; 10e-6 measured with torch's symmetric memory between two H200")
# torch for CUDA brings Triton along
_HOPPER, _BLACKWELL = (Device(type="cuda", capability=capability, triton=OLDEST) for capability in ((9, 0), (10, 0)))
_HOPPER_BF16 = Figure(788e12, "measured on an H200; vendor 989e12")

MODELS: dict[str, DeviceModel] = {
    "h100": DeviceModel(
        name="h100",
        device=_HOPPER,
        memory=Figure(79.19 * 2**30, _TORCH),
        read=Figure(3.098e12, "benchmarks/results/dense_h100.json; vendor 3.35e12"),
        fp8=Figure(1460e12, "benchmarks/results/dense_h100.json; vendor 1979e12"),
        plain=_HOPPER_BF16,
        num_processors=132,
        link=_NVLINK4,
        reduce_seconds=_REDUCE,
    ),
    "h200": DeviceModel(
        name="h200",
        device=_HOPPER,
        memory=Figure(139.80 * 2**30, _TORCH),
        read=Figure(4.49e12, "measured 2026-11; vendor 4.8e12"),
        fp8=Figure(1451e12, "measured 2026-11; vendor 1979e12"),
        plain=_HOPPER_BF16,
        num_processors=132,
        link=_NVLINK4,
        reduce_seconds=_REDUCE,
    ),
    "b200": DeviceModel(
        name="b200",
        device=_BLACKWELL,
        memory=Figure(178.35 * 2**30, _TORCH),
        read=Figure(7.67e12, "memory clock times bus width; vendor 8e12"),
        fp8=Figure(4500e12, _VENDOR),
        plain=Figure(2250e12, _VENDOR),
        num_processors=148,
        link=_NVLINK5,
        reduce_seconds=_REDUCE,
    ),
    "gb200": DeviceModel(
        name="gb200",
        device=_BLACKWELL,
        memory=Figure(184.31 * 2**30, _TORCH),
        read=Figure(8e12, _VENDOR),
        fp8=Figure(5000e12, _VENDOR),
        plain=Figure(2500e12, _VENDOR),
        num_processors=152,
        link=_NVLINK5,
        reduce_seconds=_REDUCE,
    ),
}


def model_of(name: str) -> DeviceModel:
    """The device of this name; auto is the GPU that is here, or else the CPU.

    Raises:
        ValueError: "cuda" is asked for and is not here, or is of a kind that has no row.
    """
    if name in MODELS:
        return MODELS[name]
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return cpu_model()
    if not torch.cuda.is_available():
        raise ValueError(f"device is 'cuda', but torch sees no CUDA device; name one that is not here: {', '.join(MODELS)}")
    return gpu_model()


def gpu_model() -> DeviceModel:
    """The GPU that is here: its own memory, and the rates of its kind."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    words = properties.name.lower().split()
    row = next((MODELS[word] for word in words if word in MODELS), None)
    if row is None:
        raise ValueError(f"the rates of a {properties.name} are not known; name a device that is: {', '.join(MODELS)}, cpu")
    return DeviceModel(
        name=row.name,
        device=describe(torch.device("cuda")),
        memory=Figure(float(properties.total_memory), _TORCH),
        read=row.read,
        fp8=row.fp8,
        plain=row.plain,
        num_processors=properties.multi_processor_count,
        link=row.link,
        reduce_seconds=row.reduce_seconds,
    )


def cpu_model() -> DeviceModel:
    """This machine's CPU, measured now."""
    cores = len(os.sched_getaffinity(0))
    left, right = torch.ones(PRODUCT, PRODUCT), torch.ones(PRODUCT, PRODUCT)
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), cores)

    def read() -> None:
        threads = [threading.Thread(target=part.sum) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return DeviceModel(
        name="cpu",
        device=describe(torch.device("cpu")),
        memory=Figure(float(memory_bytes()), "what this process may use"),
        read=Figure(READ_BYTES / _seconds(read), "measured now: a sum over memory"),
        fp8=None,
        plain=Figure(2 * PRODUCT**3 / _seconds(lambda: torch.mm(left, right)), "measured now: a float32 product"),
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
