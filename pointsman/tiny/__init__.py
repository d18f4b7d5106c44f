"""The bundled checkpoint: a trained MiniMax-M2 of 13 million parameters. README.md in this folder is its card."""

from pathlib import Path

NAME = "pointsman-tiny"


def path() -> Path:
    """The checkpoint's folder."""
    return Path(__file__).parent
