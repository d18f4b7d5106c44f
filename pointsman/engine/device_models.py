"""Devices by their names, as data: what a choice asks of them, and the rates that bound a step.

A rate is what a kernel that does nothing else reaches, where that was measured, else the vendor's figure; each says which. Dense rates; a
pair of GPUs is joined by NVLink. What is here (`gpu_here`, `cpu_here`) is looked at only where it is asked about, for it takes torch, or a
measurement.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import NamedTuple

from pointsman.kernels.device import Device
from pointsman.kernels.triton_support import OLDEST


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
        cache, cached_read: bytes of its last cache, and bytes a second from there; told of a CPU, for models so small that they stay in it.
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
    cache: Figure | None = None
    cached_read: Figure | None = None
    link: Figure | None = None
    reduce_seconds: Figure | None = None


CUDA = (13, 0)  # that torch is built for unless another is asked for
_VENDOR = "vendor"
AS_TORCH = "as torch reports it"
_NVLINK3 = Figure(300e9, _VENDOR)
_NVLINK4 = Figure(397e9, "copy between two H200, measured 2026-11; vendor 450e9")
_NVLINK5 = Figure(900e9, _VENDOR)
_REDUCE = Figure(0.85e-6, "what a kernel takes longer that sums by mailbox: two H100, benchmarks/results/allreduce_2xh100.json")
# torch for CUDA brings Triton along
_AMPERE, _HOPPER, _BLACKWELL = (
    Device(type="cuda", capability=capability, triton=OLDEST, cuda=CUDA) for capability in ((8, 0), (9, 0), (10, 0))
)
_HOPPER_BF16 = Figure(788e12, "measured on an H200; vendor 989e12")

MODELS: dict[str, DeviceModel] = {
    "a100": DeviceModel(
        name="a100",
        device=_AMPERE,
        memory=Figure(79.25 * 2**30, "as torch reports it elsewhere; data sheet 80 GB"),
        read=Figure(2.04e12, "data sheet of the A100 80GB SXM"),
        fp8=None,
        plain=Figure(312e12, "data sheet of the A100 80GB SXM"),
        num_processors=108,
        link=_NVLINK3,
        reduce_seconds=_REDUCE,
    ),
    "h100": DeviceModel(
        name="h100",
        device=_HOPPER,
        memory=Figure(79.19 * 2**30, AS_TORCH),
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
        memory=Figure(139.80 * 2**30, AS_TORCH),
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
        memory=Figure(178.35 * 2**30, AS_TORCH),
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
        memory=Figure(184.31 * 2**30, AS_TORCH),
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
    if name != "cpu" and driver_sees_gpu():
        gpu: DeviceModel | None = importlib.import_module("pointsman.engine.gpu_here").gpu_model()
        if gpu is not None:
            return gpu
    if name == "cuda":
        raise ValueError(f"device is 'cuda', but torch sees no CUDA device; name one that is not here: {', '.join(MODELS)}")
    cpu: DeviceModel = importlib.import_module("pointsman.engine.cpu_here").cpu_model()
    return cpu


def driver_sees_gpu() -> bool:
    """Whether a driver of CUDA is here and has a device. Where it does not, torch need not be asked."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
