"""Kernels compiled side by side before the first of them is needed.

Triton compiles a kernel when it is first launched, one after the other, and a step has some forty. Most of that time is spent outside of
Python, so threads can share it: a step is rehearsed, its launches only asking for their kernels, and then all are there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

MOST_THREADS = 32


@contextlib.contextmanager
def rehearsal(num_threads: int | None = None) -> Iterator[None]:
    """Launches that this thread makes meanwhile compile their kernels and do not run them; at the end all of them are compiled.

    What is computed meanwhile from a kernel's result is computed from memory that nobody wrote. One rehearsal at a time.

    Args:
        num_threads: that compile; None for one on each core that this process may use.
    """
    launch, asked = JITFunction.run, set()
    threads = num_threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "compile") as pool, triton.AsyncCompileMode(pool) as mode:

        def run(kernel: JITFunction[Any], *args: Any, warmup: bool, **kwargs: Any) -> Any:
            if _async_compile.active_mode.get() is not mode:  # another thread launches as ever
                return launch(kernel, *args, warmup=warmup, **kwargs)
            case = (kernel, *(_kind(value) for value in args), *((name, _kind(value)) for name, value in kwargs.items()))
            if case not in asked:
                asked.add(case)
                launch(kernel, *args, warmup=True, **kwargs)
            return None

        JITFunction.run = run  # type: ignore[method-assign]
        try:
            yield
        finally:
            JITFunction.run = launch  # type: ignore[method-assign]


def _kind(value: Any) -> Any:
    """All that a kernel is compiled by of an argument, and for other than tensors more than that."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    return value if isinstance(value, int | float | str | tuple | type(None)) else repr(value)
