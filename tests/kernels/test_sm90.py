"""The kernels compile without a GPU, for sm_90 and sm_80: tensor cores where they belong, no spills, shared memory within a processor's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiling(module: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a module of this folder prints that compiles: Triton must not be interpreting there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", f"tests.kernels.{module}"]
    report = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert report.stdout, report.stderr
    return report


@pytest.mark.parametrize("report_of", ["sm90_report", "sm90_layer", "sm80_report"])
def test_kernels_compile(report_of: str) -> None:
    report = compiling(report_of)
    summary = json.loads(report.stdout.splitlines()[-1])
    assert report.returncode == 0 and summary["faults"] == {} and summary["compiled"] > 20, report.stdout + report.stderr


def test_a_rehearsal_compiles_in_threads_and_launches_nothing(tmp_path: Path) -> None:
    """Two kernels asked for twelve times; a thread beside it compiles a third for itself and tries to run it."""
    report = json.loads(compiling("sm90_ahead", TRITON_CACHE_DIR=str(tmp_path)).stdout.splitlines()[-1])
    assert report == {"cubins": 3, "in_threads": 2, "tried_beside": ["AttributeError"], "restored": True}
