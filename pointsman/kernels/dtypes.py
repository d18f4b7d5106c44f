"""Types of numbers by their names: sizes are told of them, and choices made, where there are no tensors."""

from __future__ import annotations

NUM_BYTES = {"bfloat16": 2, "float32": 4, "fp8_e4m3": 1}
COMPUTED = ("bfloat16", "float32")  # what a model computes in


def resolve_dtype(dtype: str, device_type: str) -> str:
    """What a model computes in on a device: `dtype`, or for "auto" float32 on a CPU, bfloat16 elsewhere.

    Raises:
        ValueError: nothing computes in it.
    """
    if dtype == "auto":
        return "float32" if device_type == "cpu" else "bfloat16"
    if dtype not in COMPUTED:
        raise ValueError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(COMPUTED)}")
    return dtype
