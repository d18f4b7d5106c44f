"""The few instructions of PTX that stand inside of kernels, on arrays of 32-bit words: so that the interpreter runs what a GPU runs.

After the PTX ISA of CUDA 13, chapter 9.7. An instruction that is not here, or is written otherwise, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def _permuted(a: Words, b: Words, selector: Words) -> Words:
    """Four bytes of the eight in a and b, by the selector's hexadecimal digits."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(a, b).shape, np.uint32)
    for byte in range(4):
        digit = (selector >> np.uint32(4 * byte)) & np.uint32(0xF)
        assert (digit < 8).all(), "a selector that spreads a sign"
        out |= ((both >> (digit.astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)).astype(np.uint32) << np.uint32(8 * byte)
    return out


def _halves_multiplied(a: Words, b: Words) -> Words:
    halves = [np.ascontiguousarray(np.broadcast_to(x, np.broadcast(a, b).shape)).view(np.float16) for x in (a, b)]
    return (halves[0] * halves[1]).view(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "prmt.b32": _permuted,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mov.b32": lambda a: a,
    "mul.f16x2": _halves_multiplied,
}


def run(asm: str, inputs: Sequence[Words], num_outputs: int) -> list[Words]:
    """What the instructions leave in $0, $1, ..., given the operands that follow these."""
    registers: dict[str, Any] = {f"${num_outputs + index}": words for index, words in enumerate(inputs)}
    for statement in asm.replace("{", "").replace("}", "").split(";"):
        if not (text := statement.strip()) or text.startswith(".reg .b32"):
            continue
        name, operands = text.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = INSTRUCTIONS[name](*(registers[x] if x in registers else np.uint32(int(x, 0)) for x in sources))
    return [np.broadcast_to(registers[f"${index}"], inputs[0].shape) for index in range(num_outputs)]
