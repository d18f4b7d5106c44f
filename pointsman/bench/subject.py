"""The engine that is measured: the wait for the step that stays, and what it was set up with."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from pointsman.bench.machine import here
from pointsman.engine.engine import Engine
from pointsman.request import Request, SamplingParams

LOOK_SECONDS = 0.5


def settle(engine: Engine) -> None:
    """Wait until the engine runs the step that it will stay with: on a machine's first run another process still compiles it."""
    if not engine.step_is_final:
        print("waiting for the compiled step, once for this machine", file=sys.stderr)
    while not engine.step_is_final:
        time.sleep(LOOK_SECONDS)
        engine.add(Request(rid="settle", prompt_token_ids=(0,), sampling=SamplingParams(max_tokens=1)))
        while engine.has_work:
            engine.step()


def machine(engine: Engine) -> dict[str, Any]:
    """Versions, hardware, and what the engine was set up with."""
    gpu = {"gpu": torch.cuda.get_device_name()} if engine.choices["device"] == "cuda" else {}
    return {"model": engine.model_name, **engine.choices, "step": engine.step_name} | gpu | here()
