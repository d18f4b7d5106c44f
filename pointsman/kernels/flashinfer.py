"""The one door to `flashinfer`: imported when something of it is first needed, never before.

The library's functions have changed their parameters, their order and the numbers of their enumerations from version to version. So
every argument goes by keyword; what a version may lack is passed where its signature has it; and what is enumerated is named, never
numbered.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from pointsman.kernels.library import FLASHINFER, FLASHINFER_MINIMUM, installed


def find(module: str, name: str) -> Any:
    """What a module of the library defines.

    Raises:
        ValueError: the installed version has no such thing.
    """
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ValueError(f"FlashInfer {installed(FLASHINFER)} has no {name}; install {FLASHINFER_MINIMUM} or later")
    return found


def parameters(call: Callable[..., Any], name: str, needs: tuple[str, ...]) -> frozenset[str]:
    """The parameters of a function of the library. Raises ValueError where it lacks one that is needed."""
    found = frozenset(inspect.signature(call).parameters)
    if missing := sorted(set(needs) - found):
        raise ValueError(f"{name} of FlashInfer {installed(FLASHINFER)} has no {', '.join(missing)}; install {FLASHINFER_MINIMUM} or later")
    return found


class Function:
    """A function of `flashinfer.fused_moe`, by keyword.

    Args:
        needs: parameters that it must have; those that a call gives as `also` go only to a version that has them.

    Raises:
        ValueError: the installed version has no such function, or one without these parameters.
    """

    def __init__(self, name: str, needs: tuple[str, ...]) -> None:
        self._call = find("flashinfer.fused_moe", name)
        self.parameters = parameters(self._call, name, needs)

    def __call__(self, also: dict[str, Any], **arguments: Any) -> Tensor:
        given = arguments | {name: value for name, value in also.items() if name in self.parameters}
        result = self._call(**given)
        out: Tensor = result[0] if isinstance(result, (list, tuple)) else result  # some versions answer a list of one
        return out


def member(enumeration: str, name: str) -> Any:
    """A value of one of the library's enumerations, by name: the numbers behind them have changed."""
    values = find("flashinfer.fused_moe", enumeration)
    if not hasattr(values, name):
        raise ValueError(f"FlashInfer {installed(FLASHINFER)} has no {enumeration}.{name}; it has {', '.join(v.name for v in values)}")
    return getattr(values, name)


def autotune(tunes: bool, file: Path) -> AbstractContextManager[None]:
    """While this is entered, what is called is timed (or not) and the result is in force; the file knows what was timed before."""
    context: AbstractContextManager[None] = find("flashinfer", "autotune")(tune_mode=tunes, cache=str(file))
    return context
