"""Which device a model runs on, what it offers, and which options mean something there."""

from __future__ import annotations

import ctypes

import torch

from pointsman.config import EngineConfig
from pointsman.kernels.device import Device

CPU_OPTIONS = {"cpu_step": "auto", "num_threads": None}
CUDA_OPTIONS = {
    "disable_flashinfer_autotune": False,
    "disable_cuda_graph": False,
    "cuda_graph_max_bs": None,
    "enforce_piecewise_cuda_graph": False,
}
MEM_FRACTION = {"cpu": 0.5, "cuda": 0.9}


def choose_device(wanted: str) -> torch.device:
    """The device of this name; auto is a CUDA device where torch sees one.

    Raises:
        ValueError: it is not there; the message says why.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise ValueError(f"device is {wanted!r}, but {reason}; use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_options(config: EngineConfig, device: torch.device | Device) -> None:
    """Refuse what has no meaning on the device, or contradicts itself."""
    foreign = CUDA_OPTIONS if device.type == "cpu" else CPU_OPTIONS
    for name, default in foreign.items():
        if (value := getattr(config.kernel, name)) != default:
            other = "a CUDA device" if device.type == "cpu" else "a CPU"
            raise ValueError(f"{name} is {value!r}; it is for {other}, and the device is {device.type}: leave it out")
    kernel = config.kernel
    if kernel.disable_cuda_graph and (kernel.enforce_piecewise_cuda_graph or kernel.cuda_graph_max_bs is not None):
        other = "enforce_piecewise_cuda_graph" if kernel.enforce_piecewise_cuda_graph else "cuda_graph_max_bs"
        raise ValueError(f"disable_cuda_graph and {other} contradict each other; leave one out")
    if kernel.enforce_piecewise_cuda_graph and kernel.cuda_graph_max_bs is not None:
        raise ValueError("enforce_piecewise_cuda_graph asks for graphs of every size, cuda_graph_max_bs for a largest; leave one out")
    if kernel.enable_deterministic_inference and device.type == "cpu" and kernel.cpu_step != "compiled":
        raise ValueError(
            "enable_deterministic_inference needs --cpu-step compiled on a CPU: torch chooses its kernels by shape, so that a row "
            "may differ with its company"
        )


def return_memory(device: torch.device) -> None:
    """Give what was freed back to the device, or to the operating system where its allocator can be told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device, and how many of them are free."""
    torch.cuda.empty_cache()  # what loading has given back is free
    torch.cuda.empty_cache()  # what loading has given back is free
    free, total = torch.cuda.mem_get_info(device)
    return total, free
