"""What the devices of this machine are, as torch sees them."""

from __future__ import annotations

import torch

from pointsman.kernels.device import Device
from pointsman.kernels.library import numbers
from pointsman.kernels.triton_support import version


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device)


def describe(device: torch.device) -> Device:
    """What is known of a device of this machine."""
    there = device.type == "cuda" and torch.cuda.is_available()
    cuda = None if device.type != "cuda" or torch.version.cuda is None else numbers(torch.version.cuda)
    return Device(type=device.type, capability=capability(device) if there else None, triton=version(), cuda=cuda)


def chains(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before still runs (programmatic dependent launch)."""
    return device.type == "cuda" and capability(device) >= (9, 0)


def has_e4m3(device: torch.device) -> bool:
    """Whether kernels may name e4m3; CUDA devices before 8.9 have bytes in its place (`e4m3`)."""
    return device.type != "cuda" or capability(device) >= (8, 9)


def is_hopper(device: torch.device) -> bool:
    """Whether products run on the tensor cores of 9.0 (wgmma)."""
    return device.type == "cuda" and capability(device) == (9, 0)
