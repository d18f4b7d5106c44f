"""What an RL trainer needs beside the engine: records in the forms that frameworks eat, and the trainer's own model made to route as
the rollout did.

Names are loaded at first use: `pointsman.rl.adapters` needs numpy alone, and a data pipeline must not wait for the tensor library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointsman.rl.session import Recording, Replay, record, replay

_HOMES = dict.fromkeys(("Recording", "Replay", "record", "replay"), "pointsman.rl.session")

__all__ = ["Recording", "Replay", "record", "replay"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pointsman.rl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
