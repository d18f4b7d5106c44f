"""The experts' kernels compile for sm_90 without a GPU: wgmma where it belongs, no spills, shared memory within a processor's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sm90_report"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert report.stdout, report.stderr
    summary = json.loads(report.stdout.splitlines()[-1])
    assert report.returncode == 0 and summary["faults"] == {} and summary["compiled"] > 20, report.stdout + report.stderr
