"""Compiling kernels for sm_90 without a GPU: the launches that the host code makes, caught and compiled rather than run.

The host code runs on tensors of the meta device, in the sizes of the real model; each launch it makes is compiled for Hopper with
its very arguments. Triton must not be interpreting in this process: tests run `python -m tests.kernels.sm90_report` apart.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024
DENSE_PRODUCT = "wgmma.mma_async.sync.aligned.m64n128k32"
WIDE_PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k32"
TYPES = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
}
# Bytes of stack a thread that Triton 3.6 does not make: 3.9 keeps a tile's pointers there while the wide kernel multiplies, 3.7 something
# of it and with six query heads on each of eight ranks. More, or in another kernel, is a fault.
KNOWN_STACK = {("3.7", "wide_kernel"): 96, ("3.9", "wide_kernel"): 40, ("3.7", "qkv_post_kernel"): 24}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg", "num_ctas", "launch_cooperative_grid")


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it was launched with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """What the compiler sees of it."""
        signature, constants, attributes = self.source_parts()
        return f"{self.kernel.__name__} {signature} {constants} {attributes} {self.options}"

    def source_parts(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                block = ",".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1  # as a launch makes it
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
                if not parameter.do_not_specialize and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32"
        return signature, constants, attributes

    def compile(self, target: GPUTarget = TARGET) -> Binary:
        """Compile for sm_90, or another target, and read what the assembler says."""
        signature, constants, attributes = self.source_parts()
        of = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = of(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=target, options=self.options)
        return Binary(compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["ttgir"], *_resources(compiled.asm["cubin"]))


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: bytes of shared memory, its assembly, registers a thread and bytes of stack (spills)."""

    shared: int
    ptx: str
    ttgir: str
    registers: int
    stack: int

    @property
    def uses_wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx

    @property
    def uses_async_copies(self) -> bool:
        return "cp.async" in self.ptx


@contextlib.contextmanager
def caught() -> Iterator[list[Launch]]:
    """Launches made while it lasts are collected and not run."""
    found: list[Launch] = []

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        assert set(arguments) == set(names), set(arguments) ^ set(names)
        found.append(Launch(kernel, arguments, options))

    original = JITFunction.run
    JITFunction.run = catch  # type: ignore[method-assign]
    try:
        yield found
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def report(launches: Iterable[tuple[str, Launch]], faults: Callable[[Launch, Binary], list[str]], target: GPUTarget = TARGET) -> int:
    """Compile each launch once, say in a line after its label what came out and what is wrong with it, and end with JSON; 1 for faults."""
    seen: dict[str, list[str]] = {}
    for label, launch in launches:
        if launch.key in seen:
            continue
        binary = launch.compile(target)
        seen[launch.key] = faults(launch, binary)
        numbers = f"{binary.registers:4} registers {binary.shared:7} shared {binary.stack:5} stack"
        print(f"{label} {launch.kernel.__name__:20} {numbers}  {'; '.join(seen[launch.key])}", flush=True)
    wrong = {key: found for key, found in seen.items() if found}
    print(json.dumps({"compiled": len(seen), "faults": wrong}))
    return 1 if wrong else 0


def spilled(launch: Launch, binary: Binary) -> list[str]:
    """What is wrong with the stack that a kernel uses."""
    known = KNOWN_STACK.get((".".join(triton.__version__.split(".")[:2]), launch.kernel.__name__), 0)
    return [f"spills {binary.stack} bytes"] if binary.stack > known else []


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers is not None and stack is not None, text
    return int(registers[1]), int(stack[1])
