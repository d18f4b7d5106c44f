"""A Hopper GPU taken for an A100: Triton compiles for sm_80 down to PTX, and only the assembler learns what GPU is really there.

    python -m pytest -p tests.kernels.as_sm80 tests/kernels/test_e4m3.py
    python -m tests.kernels.as_sm80 eval arithmetic --device cuda --dtype bfloat16

Choices, bytes in the place of e4m3, tiles, and all code down to PTX are those of an A100; times, and its own instructions, are not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver

from pointsman import cli

HOPPER = (9, 0)


def pytest_configure(config: Any) -> None:
    pretend()


def pretend() -> None:
    """From now on, and for all of this process.

    Raises:
        RuntimeError: the GPU is not of capability 9.0; PTX that older ones run needs no pretending.
    """
    if (real := torch.cuda.get_device_capability()) != HOPPER:
        raise RuntimeError(f"the GPU's compute capability is {real[0]}.{real[1]}; this takes one of 9.0 for one of 8.0")
    assemble = CUDABackend.make_cubin

    def make_cubin(self: Any, ptx: str, metadata: Any, options: Any, capability: int) -> Any:
        assert capability == 80 and ".target sm_80" in ptx
        return assemble(self, ptx, metadata, options, 90)

    CUDABackend.make_cubin = make_cubin
    CudaDriver.get_current_target = lambda self: GPUTarget("cuda", 80, 32)
    torch.cuda.get_device_capability = lambda device=None: (8, 0)


if __name__ == "__main__":
    pretend()
    sys.exit(cli.main(sys.argv[1:]))
