"""Which device a model runs on, and what memory it has."""

from __future__ import annotations

import ctypes

import torch


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
