"""The GPU of this machine, as torch sees it."""

from __future__ import annotations

import dataclasses
import re

import torch

from pointsman.engine.device_models import AS_TORCH, MODELS, DeviceModel, Figure
from pointsman.kernels.capability import describe

MOST_MEMORY_APART = 0.25  # of the kind's


def gpu_model() -> DeviceModel | None:
    """The GPU that is here: its own memory, and the rates of its kind. None where torch sees none.

    Raises:
        ValueError: its kind has no row in the table of devices.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    rows = (MODELS[word] for word in re.findall(r"[a-z0-9]+", properties.name.lower()) if word in MODELS)
    # an A100 of 40 GB reads more slowly, too
    row = next((row for row in rows if abs(properties.total_memory / row.memory.value - 1) < MOST_MEMORY_APART), None)
    if row is None:
        raise ValueError(f"the rates of a {properties.name} are not known; name a device that is: {', '.join(MODELS)}, cpu")
    return dataclasses.replace(
        row,
        device=describe(torch.device("cuda")),
        memory=Figure(float(properties.total_memory), AS_TORCH),
        num_processors=properties.multi_processor_count,
    )
