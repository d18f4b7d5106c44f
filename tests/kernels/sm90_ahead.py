"""A rehearsal on a machine without a GPU, whose driver is told to be Hopper's: `python -m tests.kernels.sm90_ahead`, not interpreting.

Prints JSON: the kernels that were compiled, by which threads, and what was launched.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from pointsman.kernels.ahead import rehearsal
from pointsman.kernels.norm_quant import norm, norm_kernel
from tests.kernels.sm90 import TARGET


class Driver:
    """As much of a driver as compiling needs; it cannot launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGET


def main() -> int:
    triton.runtime.driver.set_active(Driver())
    launch = JITFunction.run
    threads: list[str] = []
    beside: list[str] = []
    triton.knobs.compilation.listener = lambda **_: threads.append(threading.current_thread().name)

    def another() -> None:
        try:
            norm(torch.zeros(1, 512, dtype=torch.bfloat16), None, torch.zeros(512, dtype=torch.bfloat16), 1e-6, False)
        except (AttributeError, RuntimeError) as error:  # there is nothing to run it on
            beside.append(type(error).__name__)

    with rehearsal(2):
        for width in (128, 256, 128, 256):
            x_TD, weight_D = torch.zeros(3, width, dtype=torch.bfloat16), torch.zeros(width, dtype=torch.bfloat16)
            for _ in range(3):
                norm(x_TD, None, weight_D, 1e-6, False)
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
    kernels = norm_kernel.device_caches[0][0].values()
    report = {
        "cubins": sum(len(kernel.asm["cubin"]) > 0 for kernel in kernels),
        "in_threads": sum(name.startswith("compile") for name in threads),
        "tried_beside": beside,
        "restored": JITFunction.run is launch,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
