"""The flags of `explain` besides those of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.config import flag

# `engine.device_models` has what they are; a test holds the two together
GPUS = ("a100", "h100", "h200", "b200", "gb200")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What is asked about."""

    checkpoint: str | None = flag(None, "folder or Hugging Face id of a checkpoint, or a config.json (default: the bundled one)")
    device: str = flag("auto", "the device, also one that is not here; auto: what is here", choices=("auto", "cpu", "cuda", *GPUS))
    batch_sizes: tuple[int, ...] = flag((1, 8, 16, 32, 64, 128, 256), "sequences that decode together, for the floors", low=1, high=1 << 16)
    context: int | None = flag(
        None, "tokens that each of them has, and of a prompt (default: 1024, or the most that a request has)", low=1, high=1 << 24
    )
    plot: str | None = flag(None, "draw memory and floors into this SVG file")
    json: bool = flag(False, "print one JSON object instead of tables")
