"""Programs of this package as processes of their own: the very package that starts them, wherever they are started.

Python would look in the current folder first. Where that holds another copy of the package, such as the checkout that it was installed
from, a program would run that copy's code and leave what it makes beside it, where nobody looks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def command(module: str, *words: str) -> list[str]:
    """The command line of a module of this package that can be run; it needs `environment`."""
    return [sys.executable, "-P", "-m", module, *words]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """That of this process and more, with this package before all others."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **more, "PYTHONPATH": path}
