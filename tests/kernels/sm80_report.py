"""Compiles what a model in block FP8 launches on GPUs before Hopper, for sm_80 without a GPU: kernels there see e4m3 as bytes.

    python -m tests.kernels.sm80_report [--all]

Without `--all`, a few sizes that stand for the others, and attention that quantizes for that which does not. The lines are those of
`sm90_report`.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from pointsman.kernels import e4m3
from pointsman.kernels.routing import Choice, choose_experts, router_logits
from pointsman.moe.grouped import TritonRunner
from pointsman.moe.routing import Routing
from pointsman.moe.weights import ExpertWeights
from tests.kernels.sm90 import Binary, Launch, caught, report
from tests.kernels.sm90_layer import meta, others, products, sampler
from tests.kernels.sm90_report import HIDDEN, NUM_EXPERTS, TOP_K, WIDTH, stack

TARGET = GPUTarget("cuda", 80, 32)
SHARED_LIMIT = 99 * 1024  # of sm_86 and sm_89; sm_80 has 163 KiB
# Bytes of stack a thread, at most, where all registers are in use: prefill, four warps that decode tiles of 64 rows and 128 columns, and
# (in Triton 3.6) sixteen warps that sort
KNOWN_STACK = {"attend_kernel": 72, "gemm_kernel": 128, "multiply_kernel": 176, "arrange_kernel": 16}
PRODUCTS = {"gemm_kernel", "multiply_kernel", "attend_kernel", "gate_kernel"}
FEW = [(1, 1), (2, 2048)]
ALL = [(tp, 2**power) for tp in (1, 2, 4) for power in range(14)]


def experts(tp: int, num_tokens: int) -> list[Launch]:
    """The router and the runner `triton`."""
    width = WIDTH // tp
    weights = ExpertWeights(stack(2 * width, HIDDEN), stack(HIDDEN, width))
    x_TD, slots_T = meta(num_tokens, HIDDEN, dtype=torch.bfloat16), meta(num_tokens, dtype=torch.int64)
    rows_CLK = meta(4096, 62, TOP_K, dtype=torch.uint8)
    with caught() as found:
        logits = router_logits(x_TD, meta(NUM_EXPERTS, HIDDEN))
        choice = Choice(top_k=TOP_K, softmax=False, bias_E=meta(NUM_EXPERTS), rows_CLK=rows_CLK, layer=1)
        ids_TK, weights_TK = choose_experts(logits, choice, slots_T)
        TritonRunner()(x_TD, Routing(ids_TK, weights_TK), weights)
    return found


def faults(launch: Launch, binary: Binary) -> list[str]:
    """What a shipped kernel must not be."""
    known = KNOWN_STACK.get(launch.kernel.__name__, 0)
    found = [f"spills {binary.stack} bytes"] if binary.stack > known else []
    if binary.shared > SHARED_LIMIT:
        found.append(f"needs {binary.shared} bytes of shared memory")
    if launch.kernel.__name__ in PRODUCTS and "mma.sync" not in binary.ptx:
        found.append("multiplies without tensor cores")
    return found


def launches(tp: int, num_rows: int, *, whole: bool) -> list[Launch]:
    """A layer's, and for one row what depends on the number of rows in its grid alone, with the sampler."""
    found = experts(tp, num_rows) + products(tp, num_rows, hopper=False)
    if num_rows == 1:
        found += [launch for launch in others(tp, num_rows, hopper=False) if whole or launch.arguments.get("QUANTIZE", True)]
        found += sampler(num_rows)
    return found


def main() -> int:
    whole = "--all" in sys.argv[1:]
    with mock.patch.object(e4m3, "has_e4m3", lambda device: False):
        found = (
            (f"tp {tp} rows {num_rows:5}", launch)
            for tp, num_rows in (ALL if whole else FEW)
            for launch in launches(tp, num_rows, whole=whole)
        )
        return report(found, faults, TARGET)


if __name__ == "__main__":
    sys.exit(main())
