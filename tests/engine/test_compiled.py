"""The change from the torch step to the compiled one while serving."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pointsman.engine.compiled import ChangingStep


class Named:
    """A step that answers with its name."""

    final = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, batch: Any, lanes: Any) -> Any:
        return self.name


def compiler(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True)


WAIT = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"


def changing(process: subprocess.Popen[str]) -> Any:
    make: Any = lambda: Named("compiled")  # noqa: E731
    now: Any = Named("torch")
    return ChangingStep(now, process, make)


def run_until_final(step: Any) -> None:
    while not step.final:
        time.sleep(0.01)
        step(None, None)


def test_the_first_step_after_the_compiler_is_the_compiled_one(tmp_path: Path) -> None:
    step = changing(compiler(WAIT, str(tmp_path / "go")))
    assert (step(None, None), step.name, step.final) == ("torch", "torch", False)
    (tmp_path / "go").touch()
    run_until_final(step)
    assert (step(None, None), step.name) == ("compiled", "compiled")


def test_where_compiling_fails_torch_goes_on_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        step = changing(compiler("import sys; sys.exit('no such processor')"))
        run_until_final(step)
    assert (step(None, None), step.name) == ("torch", "torch")
    assert "no such processor" in caplog.text


def test_where_what_was_compiled_cannot_be_had_torch_goes_on_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        raise RuntimeError("it is gone")

    now: Any = Named("torch")
    with caplog.at_level(logging.WARNING):
        step = ChangingStep(now, compiler(""), make)
        run_until_final(step)
    assert (step(None, None), step.name, step.final) == ("torch", "torch", True)
    assert "it is gone" in caplog.text and "compiled from here on" not in caplog.text


def test_an_engine_that_ends_first_leaves_the_compiler_to_itself(tmp_path: Path) -> None:
    """Warnings are errors, and a process that nobody waits for is one."""
    step = changing(compiler(WAIT + "\nopen(sys.argv[2], 'w')", str(tmp_path / "go"), str(tmp_path / "done")))
    del step
    gc.collect()
    (tmp_path / "go").touch()
    while not (tmp_path / "done").exists():
        time.sleep(0.01)
