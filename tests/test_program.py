"""Programs of this package are this package's, wherever they are started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import pointsman
from pointsman import program


def test_another_copy_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "pointsman" / "kernels"
    other.mkdir(parents=True)
    for folder in (other.parent, other):
        (folder / "__init__.py").touch()
    (other / "cpu_object.py").write_text("raise SystemExit('the other copy')")
    monkeypatch.chdir(tmp_path)
    command, environment = program.command("pointsman.kernels.cpu_object", "none"), program.environment({"EXTRA": "1"})
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "must be four of" in ended.stderr and "the other copy" not in ended.stderr
    assert environment["EXTRA"] == "1" and environment["PYTHONPATH"].startswith(str(Path(pointsman.__file__).parents[1]))
