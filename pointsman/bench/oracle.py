"""Hugging Face's model of a checkpoint, to be compared with: the package's one door to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_oracle(folder: str | Path) -> Any:
    """The model in float32, weights dequantized by the library itself.

    Raises:
        ValueError: transformers is not installed, or does not know the checkpoint.
    """
    try:
        import transformers  # noqa: PLC0415 - seconds, and of the tests only
    except ImportError as error:
        raise ValueError(f"this needs transformers, which is not installed ({error}): pip install 'pointsman[test]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"transformers cannot load {folder}: {error}") from None
