"""An install without Triton serves on a CPU, and says on a GPU what it lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.metadata, sys
sys.modules["triton"] = None  # importing it fails
whole = importlib.metadata.version
def version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return whole(name)
importlib.metadata.version = version
import torch
from pointsman.moe.runner import RUNNERS
from pointsman.moe.candidates import runner_choice, unsupported
from pointsman.kernels.capability import describe
from pointsman.moe.routing import RoutingSpec
from pointsman.moe.spec import ExpertForm
import pointsman.engine.llm, pointsman.bench.kernels, pointsman.bench.tune
spec, form = RoutingSpec(num_experts=8, top_k=2, score="sigmoid"), ExpertForm(256, 128, (128, 128))
print(runner_choice("auto", spec, form, device=describe(torch.device("cpu")), dtype="float32").take())
print(unsupported("routed", spec, form, describe(torch.device("cuda")), "bfloat16"))
"""


def test_triton_is_imported_by_those_who_run_it_alone() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["cpu", "it needs the triton package, which is not installed"]
