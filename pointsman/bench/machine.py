"""What a figure was measured on: without that it means nothing. And the wait for the step that stays."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pointsman
from pointsman.engine.engine import Engine
from pointsman.request import Request, SamplingParams

CPU_INFO = Path("/proc/cpuinfo")
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
    return {"model": engine.model_name, **engine.choices, "step": engine.step_name} | here()


def here() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "pointsman": pointsman.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree this package runs from; None where it was installed."""
    root = Path(pointsman.__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
