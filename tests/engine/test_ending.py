"""The end of a process whose device is never through; what stands for the device is an event that nobody sets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pointsman.engine import ending

SCRIPT = """
import atexit, sys, threading
from pointsman.engine import ending
ending.THROUGH_SECONDS = 0.05
def broken(): raise RuntimeError("illegal address\\nmore")
waits = {"never": threading.Event().wait, "fails": broken, "through": lambda: None}
atexit.register(lambda: sys.stdout.write("freed "))
ending.end_without(waits[sys.argv[1]], "the device")
sys.stdout.write("last ")
"""


@pytest.mark.parametrize(
    ("how", "code", "written", "told"),
    [
        ("never", ending.STATUS, "last ", "the device is not through after 0.05 s; when this process ends, it ends at once, with status 1"),
        ("fails", ending.STATUS, "last ", "the device has failed (illegal address); when"),
        ("through", 0, "last freed ", ""),
    ],
)
def test_nothing_is_freed_where_the_device_is_not_through(how: str, code: int, written: str, told: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, written)
    assert told in done.stderr and bool(done.stderr) == bool(told)
