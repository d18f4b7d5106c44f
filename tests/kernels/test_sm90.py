"""The kernels compile for sm_90 without a GPU: wgmma where it belongs, no spills, shared memory within a processor's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("report_of", ["sm90_report", "sm90_layer"])
def test_kernels_compile_for_hopper(report_of: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{report_of}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert report.stdout, report.stderr
    summary = json.loads(report.stdout.splitlines()[-1])
    assert report.returncode == 0 and summary["faults"] == {} and summary["compiled"] > 20, report.stdout + report.stderr
