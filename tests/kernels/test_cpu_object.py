"""Where the compiled step is kept, and that it is found again. (That it computes the right thing is tested with the step.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.kernels import cpu_object
from pointsman.kernels.cpu_object import Kinds, is_cached, load, start_compiling

KINDS: Kinds = ("e4m3", "e4m3", "bfloat16", "bfloat16")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that cannot be written beside, and a cache folder of the user's own."""
    package = tmp_path / "package"
    package.mkdir()
    for source in Path(cpu_object.__file__).parent.glob("*.py"):
        (package / source.name).symlink_to(source)
    (package / "__pycache__").touch()
    monkeypatch.setattr(cpu_object, "__file__", str(package / "cpu_object.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_compiled_step_is_found() -> None:
    load(KINDS)
    assert is_cached(KINDS)
    assert load(KINDS) is load(KINDS)


def test_without_a_folder_nothing_is_cached(elsewhere: Path) -> None:
    assert not is_cached(KINDS)
    (elsewhere / "cache").touch()
    assert not is_cached(KINDS)
    with pytest.raises(RuntimeError, match=r"no folder takes the compiled step: .*package.*cache"):
        cpu_object._store(b"", KINDS)


def test_the_users_folder_serves_where_the_sources_cannot_be_written(elsewhere: Path) -> None:
    place = cpu_object._store(b"object", KINDS)
    assert place.parent == elsewhere / "cache" / "pointsman" and place.read_bytes() == b"object"
    assert is_cached(KINDS) and not is_cached(("float32", "e4m3", "bfloat16", "bfloat16"))
    assert [file.name for file in place.parent.iterdir()] == [place.name]


def test_a_changed_source_or_processor_is_another_object(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cpu_object._digest.__wrapped__()
    source = elsewhere / "package" / "cpu_tile.py"
    text = source.read_text()
    source.unlink()
    source.write_text(text + "\n")
    second = cpu_object._digest.__wrapped__()
    monkeypatch.setattr(cpu_object, "_processor", lambda: ("triple", "name", "features"))
    assert len({first, second, cpu_object._digest.__wrapped__()}) == 3


def test_sources_are_all_that_is_compiled() -> None:
    """The digest covers every module of ours that the compiling process imports for the region."""
    listing = "import sys, pointsman.kernels.cpu_region; print(*(m for m in sys.modules if m.startswith('pointsman.kernels.')))"
    before = "import sys, pointsman.kernels; print(*(m for m in sys.modules if m.startswith('pointsman.kernels.')))"
    loaded, package = (
        set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
        for code in (listing, before)
    )
    assert {name.rsplit(".")[-1] for name in loaded - package} <= set(cpu_object.SOURCES)


def test_loading_needs_no_compiler() -> None:
    """Nothing that a cached step imports brings numba."""
    code = f"import sys, pointsman.kernels.cpu_step as step; step.is_cached({KINDS}); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_found_is_told(elsewhere: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the compiled step is in none of .*package.*cache"):
        cpu_object._link.__wrapped__(KINDS)


def test_unknown_forms_fail_and_say_why() -> None:
    process = start_compiling(("float16", "e4m3", "bfloat16", "bfloat16"))
    _, errors = process.communicate()
    assert process.returncode != 0 and "must be four of float32, bfloat16, e4m3" in errors
