"""What a Triton kernel needs of the machine, told without importing Triton: installs without it must still explain themselves."""

from __future__ import annotations

import importlib.metadata
import re

from pointsman.kernels.device import Device

OLDEST = (3, 4)
GLUON = (3, 6)  # whose Gluon can specialize warps on Hopper


def version() -> tuple[int, int] | None:
    """Triton's version; None where it is not installed."""
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)", text)
    assert found is not None, f"triton calls its version {text!r}"
    return int(found[1]), int(found[2])


def reason_against(device: Device, *, needs: tuple[int, int], exactly: bool = False) -> str | None:
    """Why kernels made for this capability (or, unless `exactly`, a later one) cannot run on the device, or None."""
    wanted = f"a CUDA device of compute capability {needs[0]}.{needs[1]}{'' if exactly else ' or later'}"
    if device.type != "cuda":
        return f"it needs {wanted}; the device is {device.type}"
    have, got = device.triton, device.capability
    if have is None:
        return "it needs the triton package, which is not installed"
    if have < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or later; {have[0]}.{have[1]} is installed"
    if got is None:
        return f"it needs {wanted}; torch sees none"
    if got < needs or (exactly and got != needs):
        return f"it needs {wanted}; this one has {got[0]}.{got[1]}"
    return None


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keywords of a launch that may begin while the kernel before still runs."""
    return {"launch_pdl": True} if pdl else {}
