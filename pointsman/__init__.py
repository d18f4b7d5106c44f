"""Pointsman: an inference engine for FP8 mixture-of-experts language models, in which expert routing is data.

The names below are the public Python API. They are loaded at first use: the command line and the HTTP side of the server
import this package too, and must not wait for the tensor library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointsman.config import EngineConfig
    from pointsman.engine.llm import LLM
    from pointsman.request import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "pointsman.engine.llm",
    "SamplingParams": "pointsman.request",
    "EngineConfig": "pointsman.config",
    "RequestOutput": "pointsman.request",
    "CompletionOutput": "pointsman.request",
    "FinishReason": "pointsman.request",
    "Logprob": "pointsman.request",
}

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "FinishReason", "Logprob", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pointsman' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
