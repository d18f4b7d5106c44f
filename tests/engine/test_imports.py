"""An engine in process needs none of the server's libraries, nor what compiles grammars: machines with GPUs often lack them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"zmq", "fastapi", "uvicorn", "starlette", "xgrammar", "prometheus_client", "transformers"}:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Missing())
for part in ("cache", "engine", "kernels", "layers", "models", "moe", "scheduler", "text"):
    package = importlib.import_module(f"pointsman.{part}")
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        if not name.startswith("pointsman.engine.ray"):  # for those who have Ray
            importlib.import_module(name)

from pointsman import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", cpu_step="torch", progress=False)
(result,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
assert len(result.outputs[0].token_ids) == 3
llm.close()
"""


def test_an_engine_runs_without_them(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
