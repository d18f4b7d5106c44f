"""What choosing an implementation needs to know of a device, be it here or not. No tensors: a choice can be explained anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """A description of a device.

    Attributes:
        type: "cpu" or "cuda".
        capability: compute capability, (9, 0) for Hopper; None for a CPU, and where torch sees no such device.
        triton: version of the triton package beside it; None where it is not installed.
        cuda: version of CUDA that torch beside it was built for; None where it was built for none.
    """

    type: str
    capability: tuple[int, int] | None = None
    triton: tuple[int, int] | None = None
    cuda: tuple[int, ...] | None = None
