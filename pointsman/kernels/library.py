"""What can be said of a library of kernels without importing it: whether it is there, which version, and whether the device is its."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re

from pointsman.kernels.device import Device

Version = tuple[int, ...]

FLASHINFER = ("flashinfer-python",)
FLASHINFER_MINIMUM = "0.6.8"  # the first whose experts write into a given output, are tuned when pre-routed, and have MiniMax's routing


@functools.cache
def installed(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed, or None."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def numbers(version: str) -> Version:
    """(0, 7, 2) of "0.7.2.post1": the release that a version belongs to."""
    found = re.match(r"\d+(\.\d+)*", version)
    if found is None:
        raise ValueError(f"{version!r} is no version")
    return tuple(int(part) for part in found[0].split("."))


def reason_against_library(module: str, distributions: tuple[str, ...], extra: str, least: str | None = None) -> str | None:
    """Why a library cannot be used, or None: it is not installed, or older than `least`."""
    how = f"pip install 'pointsman[{extra}]'"
    version = installed(distributions)
    if version is None or importlib.util.find_spec(module) is None:
        return f"it needs the {module} library, which is not installed: {how}"
    if least is not None and numbers(version) < numbers(least):
        return f"it needs {module} {least} or later; {version} is installed: {how}"
    return None


def reason_against_flashinfer() -> str | None:
    """Why FlashInfer cannot be used, or None."""
    return reason_against_library("flashinfer", FLASHINFER, "flashinfer", FLASHINFER_MINIMUM)


def reason_against_device(device: Device, wanted: tuple[tuple[int, int], ...]) -> str | None:
    """Why a library's kernels for these compute capabilities cannot run on a device, or None."""
    needs = f"it needs a CUDA device of {' or '.join(f'sm_{major}{minor}' for major, minor in wanted)}"
    if device.type != "cuda":
        return f"{needs}; the device is {device.type}"
    if (have := device.capability) is None:
        return f"{needs}; torch sees none"
    if have not in wanted:
        return f"{needs}; this one is sm_{have[0]}{have[1]}"
    return None
