"""The bundled checkpoint: a small MiniMax-M2 that was trained for this package. Its card is the README.md beside this file."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the checkpoint."""
    return Path(__file__).parent
