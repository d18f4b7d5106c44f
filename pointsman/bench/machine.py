"""What a figure was measured on: without that it means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pointsman

CPU_INFO = Path("/proc/cpuinfo")


def here() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "pointsman": pointsman.__version__,
        "commit": commit(),
        "torch": importlib.metadata.version("torch"),
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


def peak_memory_mb(process: int | str = "self") -> float:
    """The most memory a process has held so far, in MB; 0 where it has ended and nobody has asked how.

    Not `ru_maxrss`, which never falls below what the process held that started this one. Raises OSError where there is no such process.
    """
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return round(kilobytes * 1.024 / 1000, 1)
